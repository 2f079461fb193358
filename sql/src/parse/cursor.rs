//! A cursor over the tokens of one statement; sqlparser's parser with errors of ours.

use datafusion::sql::sqlparser::ast::{self, Ident, ObjectName, ObjectNamePart};
use datafusion::sql::sqlparser::parser::{Parser, ParserError};
use datafusion::sql::sqlparser::tokenizer::{
    Token, TokenWithSpan, Tokenizer, TokenizerError, Whitespace,
};
use millrace_dataflow::error::{Error, Result};

use super::dialect::Postgres;
use super::{Options, limits, refuse};
use crate::catalog::LakeName;
use crate::error::{clean, lower_first, nearest, syntax};

static DIALECT: Postgres = Postgres;

/// Nested parentheses, subqueries and types that the parser follows.
const RECURSION_LIMIT: usize = 400;

/// Tokens of a script without white space, and what could not be read.
pub(crate) fn tokenize(script: &str) -> (Vec<TokenWithSpan>, Option<TokenizerError>) {
    let mut tokens = Vec::new();
    let outcome = Tokenizer::new(&DIALECT, script).tokenize_with_location_into_buf(&mut tokens);
    tokens.retain(|t| !matches!(&t.token, Token::Whitespace(_)));
    debug_assert!(
        !tokens
            .iter()
            .any(|t| t.token == Token::Whitespace(Whitespace::Space))
    );
    (tokens, outcome.err())
}

/// Turns (line, column) into a number of characters.
#[derive(Debug)]
pub(crate) struct Lines {
    chars: Vec<char>,
    /// Character index at which each line begins.
    starts: Vec<usize>,
}

impl Lines {
    pub(crate) fn of(text: &str) -> Self {
        let chars: Vec<char> = text.chars().collect();
        let starts = std::iter::once(0)
            .chain(
                chars
                    .iter()
                    .enumerate()
                    .filter(|(_, c)| **c == '\n')
                    .map(|(i, _)| i + 1),
            )
            .collect();
        Self { chars, starts }
    }
    /// Characters before the place.
    pub(crate) fn offset(&self, (line, column): (u64, u64)) -> usize {
        let start = (line as usize)
            .checked_sub(1)
            .and_then(|l| self.starts.get(l))
            .copied()
            .unwrap_or(self.chars.len());
        (start + (column as usize).saturating_sub(1)).min(self.chars.len())
    }
    pub(crate) fn slice(&self, from: usize, to: usize) -> String {
        self.chars[from.min(to)..to].iter().collect()
    }
}

pub(crate) struct Cursor<'a> {
    parser: Parser<'a>,
    lines: &'a Lines,
    end: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(tokens: Vec<TokenWithSpan>, lines: &'a Lines) -> Self {
        let end = tokens
            .last()
            .map_or(0, |t| lines.offset((t.span.end.line, t.span.end.column)));
        Self {
            parser: Parser::new(&DIALECT)
                .with_recursion_limit(RECURSION_LIMIT)
                .with_tokens_with_locations(tokens),
            lines,
            end,
        }
    }
    /// Character position of the next token, from 1.
    pub(crate) fn position(&self) -> usize {
        let token = self.parser.peek_token_ref();
        if token.token == Token::EOF {
            self.end + 1
        } else {
            self.lines
                .offset((token.span.start.line, token.span.start.column))
                + 1
        }
    }
    /// The next token, quoted for a message.
    pub(crate) fn here(&self) -> String {
        match &self.parser.peek_token_ref().token {
            Token::EOF => "end of input".to_string(),
            token => format!("\"{token}\""),
        }
    }
    /// The next token as an unquoted word in lower case.
    pub(crate) fn peek_word(&self) -> Option<String> {
        match &self.parser.peek_token_ref().token {
            Token::Word(w) if w.quote_style.is_none() => Some(w.value.to_lowercase()),
            _ => None,
        }
    }
    pub(crate) fn peek_is(&self, token: &Token) -> bool {
        self.parser.peek_token_ref().token == *token
    }
    pub(crate) fn at_end(&self) -> bool {
        self.peek_is(&Token::EOF)
    }
    pub(crate) fn advance(&mut self) {
        self.parser.advance_token();
    }
    /// Takes these words if they all come next.
    pub(crate) fn take_words(&mut self, words: &[&str]) -> bool {
        for (taken, word) in words.iter().enumerate() {
            if self.peek_word().as_deref() == Some(word) {
                self.advance();
            } else {
                for _ in 0..taken {
                    self.parser.prev_token();
                }
                return false;
            }
        }
        true
    }
    pub(crate) fn take(&mut self, token: &Token) -> bool {
        self.parser.consume_token(token)
    }
    pub(crate) fn unexpected(&self, expected: &str) -> Error {
        syntax(format!(
            "syntax error at or near {}: expected {expected}",
            self.here()
        ))
        .position(self.position())
    }
    pub(crate) fn expect_words(&mut self, words: &[&str]) -> Result<()> {
        if self.take_words(words) {
            return Ok(());
        }
        let expected = words.join(" ").to_uppercase();
        let error = self.unexpected(&expected);
        let found = self.peek_word().unwrap_or_default();
        Err(match nearest(&found, words.iter().copied()) {
            Some(near) if !words.contains(&found.as_str()) => {
                error.hint(format!("did you mean {}?", near.to_uppercase()))
            }
            _ => error,
        })
    }
    pub(crate) fn expect(&mut self, token: &Token) -> Result<()> {
        if self.take(token) {
            Ok(())
        } else {
            Err(self.unexpected(&format!("\"{token}\"")))
        }
    }
    pub(crate) fn end(&self) -> Result<()> {
        if self.at_end() {
            Ok(())
        } else {
            Err(self.unexpected("end of statement"))
        }
    }
    /// One identifier, folded to lower case unless quoted.
    pub(crate) fn name(&mut self) -> Result<String> {
        match &self.parser.peek_token_ref().token {
            Token::Word(w) => {
                let name = match w.quote_style {
                    Some(_) => w.value.clone(),
                    None => w.value.to_lowercase(),
                };
                if name.is_empty() {
                    return Err(syntax("zero-length identifier").position(self.position()));
                }
                self.advance();
                Ok(name)
            }
            _ => Err(self.unexpected("a name")),
        }
    }
    fn name_parts(&mut self) -> Result<Vec<String>> {
        let mut parts = vec![self.name()?];
        while self.take(&Token::Period) {
            parts.push(self.name()?);
        }
        Ok(parts)
    }
    /// The unqualified name of an object of ours.
    pub(crate) fn object(&mut self, what: &str) -> Result<String> {
        let position = self.position();
        let parts = self.name_parts()?;
        match <[String; 1]>::try_from(parts) {
            Ok([name]) if name.contains('$') => Err(Error::invalid(format!(
                "the name of a {what} cannot contain \"$\""
            ))
            .code("42602")
            .position(position)
            .hint("names with $ are relations the system makes, such as name$errors")),
            Ok([name]) => Ok(name),
            Err(parts) => Err(Error::invalid(format!(
                "\"{}\" is not the name of a {what}",
                parts.join(".")
            ))
            .code("42602")
            .position(position)
            .hint(format!("the name of a {what} is one word, without dots"))),
        }
    }
    /// A relation to read: `name`, or `lake.ns.t`, in its stored form.
    pub(crate) fn relation(&mut self) -> Result<String> {
        let position = self.position();
        let parts = self.name_parts()?;
        if parts.len() == 1 {
            return Ok(parts.into_iter().next().unwrap_or_default());
        }
        LakeName::from_parts(&parts)
            .map(|n| n.to_string())
            .map_err(|e| e.position(position))
    }
    /// `lake.ns.t`.
    pub(crate) fn lake_name(&mut self) -> Result<LakeName> {
        let position = self.position();
        let parts = self.name_parts()?;
        LakeName::from_parts(&parts).map_err(|e| e.position(position))
    }
    /// Name of a view: one word or `lake.ns.t`.
    pub(crate) fn view_name(&mut self) -> Result<(String, Option<LakeName>)> {
        let dotted = self.parser.peek_nth_token_ref(1).token == Token::Period;
        if dotted {
            let lake = self.lake_name()?;
            Ok((lake.to_string(), Some(lake)))
        } else {
            Ok((self.object("view")?, None))
        }
    }
    pub(crate) fn if_not_exists(&mut self) -> bool {
        self.take_words(&["if", "not", "exists"])
    }
    pub(crate) fn query(&mut self) -> Result<Box<ast::Query>> {
        let query = self.parser.parse_query();
        let mut query = query.map_err(|e| self.parser_error(e))?;
        limits::check(&mut query)?;
        refuse::check(&query, self.lines)?;
        Ok(query)
    }
    pub(crate) fn expr(&mut self) -> Result<ast::Expr> {
        let expr = self.parser.parse_expr();
        let mut expr = expr.map_err(|e| self.parser_error(e))?;
        limits::check(&mut expr)?;
        refuse::check(&expr, self.lines)?;
        Ok(expr)
    }
    pub(crate) fn data_type(&mut self) -> Result<ast::DataType> {
        let data_type = self.parser.parse_data_type();
        data_type.map_err(|e| self.parser_error(e))
    }
    /// `(key = value, …)`.
    /// A whole number without a sign.
    pub(crate) fn number(&mut self) -> Result<u64> {
        let text = match self.parser.peek_token_ref().token.clone() {
            Token::Number(text, _) => text,
            _ => return Err(self.unexpected("a number")),
        };
        let Ok(number) = text.parse() else {
            return Err(self.unexpected("a whole number"));
        };
        self.advance();
        Ok(number)
    }
    pub(crate) fn options(&mut self) -> Result<Options> {
        let mut options = Options::new();
        self.expect(&Token::LParen)?;
        if self.take(&Token::RParen) {
            return Ok(options);
        }
        loop {
            let position = self.position();
            let key = match &self.parser.peek_token_ref().token {
                Token::SingleQuotedString(s) => {
                    let key = s.to_lowercase();
                    self.advance();
                    key
                }
                _ => self.name_parts()?.join(".").to_lowercase(),
            };
            self.expect(&Token::Eq)?;
            let value = self.option_value()?;
            if options.insert(key.clone(), value).is_some() {
                return Err(syntax(format!("option \"{key}\" is given twice"))
                    .position(position)
                    .hint("leave one of them out"));
            }
            if !self.take(&Token::Comma) {
                break;
            }
        }
        self.expect(&Token::RParen)?;
        Ok(options)
    }
    fn option_value(&mut self) -> Result<String> {
        let negative = self.take(&Token::Minus);
        let value = match &self.parser.peek_token_ref().token {
            Token::Number(n, _) => Some(if negative { format!("-{n}") } else { n.clone() }),
            _ if negative => None,
            Token::SingleQuotedString(s)
            | Token::EscapedStringLiteral(s)
            | Token::UnicodeStringLiteral(s) => Some(s.clone()),
            Token::DollarQuotedString(s) => Some(s.value.clone()),
            Token::Word(w)
                if w.quote_style.is_none()
                    && (w.value.eq_ignore_ascii_case("true")
                        || w.value.eq_ignore_ascii_case("false")) =>
            {
                Some(w.value.to_lowercase())
            }
            _ => None,
        };
        match value {
            Some(value) => {
                self.advance();
                Ok(value)
            }
            None => Err(self.unexpected("a value in single quotes, a number, TRUE or FALSE")),
        }
    }
    fn parser_error(&self, error: ParserError) -> Error {
        let message = match error {
            ParserError::RecursionLimitExceeded => return limits::too_deep(),
            ParserError::TokenizerError(m) | ParserError::ParserError(m) => m,
        };
        let (text, place) = split_place(&message);
        let position = place.map_or(self.end + 1, |p| self.lines.offset(p) + 1);
        let text = clean(text);
        let error = match text
            .strip_prefix("Expected: ")
            .and_then(|rest| rest.split_once(", found: "))
        {
            Some((expected, found)) => syntax(format!(
                "syntax error at or near {}: expected {}",
                if found == "EOF" {
                    "end of input".to_string()
                } else {
                    format!("\"{found}\"")
                },
                expected
            )),
            None => syntax(lower_first(&text)),
        };
        error.position(position)
    }
    /// Gives an error without a position the position of the statement's first token.
    pub(crate) fn place<T>(&self, result: Result<T>) -> Result<T> {
        result
    }
}

/// `text at Line: 1, Column: 8`.
fn split_place(message: &str) -> (&str, Option<(u64, u64)>) {
    let Some(at) = message.rfind(" at Line: ") else {
        return (message, None);
    };
    let rest = &message[at + " at Line: ".len()..];
    let place = rest
        .split_once(", Column: ")
        .and_then(|(l, c)| Some((l.trim().parse().ok()?, c.trim().parse().ok()?)));
    (&message[..at], place)
}

/// An identifier as the catalog writes it.
pub(crate) fn fold(ident: &Ident) -> String {
    match ident.quote_style {
        Some(_) => ident.value.clone(),
        None => ident.value.to_lowercase(),
    }
}

/// Parts of a name as the catalog writes them; `None` for forms that no relation has.
pub(crate) fn fold_name(name: &ObjectName) -> Option<Vec<String>> {
    name.0
        .iter()
        .map(|part| match part {
            ObjectNamePart::Identifier(ident) => Some(fold(ident)),
            ObjectNamePart::Function(_) => None,
        })
        .collect()
}

/// Identifiers as the catalog writes them.
pub(crate) fn fold_idents(idents: &[Ident]) -> Vec<String> {
    idents.iter().map(fold).collect()
}
