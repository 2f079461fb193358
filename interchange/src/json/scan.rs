//! A cursor over one JSON text. Checks the grammar, materialises nothing.
//!
//! The text is valid UTF-8 (the caller has checked), and every cut is made at an ASCII byte, so a
//! slice of it is valid UTF-8 too.

use crate::format::Reject;

/// Levels of nesting; deeper input is refused before it can exhaust the stack.
pub(super) const DEPTH_MAX: usize = 128;

pub(super) struct Scan<'a> {
    text: &'a [u8],
    at: usize,
}

/// Where a string (without its quotes) or a number stands.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span {
    start: usize,
    end: usize,
    pub(super) escaped: bool,
}

impl<'a> Scan<'a> {
    pub(super) fn new(text: &'a [u8]) -> Self {
        Self { text, at: 0 }
    }

    #[inline]
    pub(super) fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }
    #[inline]
    pub(super) fn next(&mut self) -> Option<u8> {
        let byte = self.peek();
        self.at += 1;
        byte
    }
    #[inline]
    pub(super) fn step(&mut self) {
        self.at += 1;
    }
    #[inline]
    pub(super) fn advance(&mut self, bytes: usize) {
        self.at += bytes;
    }
    #[inline]
    pub(super) fn rest(&self) -> &'a [u8] {
        self.text.get(self.at..).unwrap_or_default()
    }
    #[inline]
    pub(super) fn slice(&self, span: Span) -> &'a [u8] {
        &self.text[span.start..span.end]
    }

    #[inline]
    pub(super) fn space(&mut self) {
        while let Some(b' ' | b'\t' | b'\n' | b'\r') = self.peek() {
            self.at += 1;
        }
    }

    #[cold]
    pub(super) fn error(&self, what: &str) -> Reject {
        Reject(format!(
            "invalid JSON at byte {}: {what}",
            self.at.min(self.text.len())
        ))
    }

    pub(super) fn literal(&mut self, word: &[u8]) -> Result<(), Reject> {
        if !self.rest().starts_with(word) {
            return Err(self.error("expected a value"));
        }
        self.at += word.len();
        Ok(())
    }

    /// A string, from behind its opening quote to behind its closing one.
    #[inline]
    pub(super) fn string(&mut self) -> Result<Span, Reject> {
        let start = self.at;
        let mut escaped = false;
        loop {
            self.at += plain_prefix(self.rest());
            match self.peek() {
                Some(b'"') => {
                    let end = self.at;
                    self.at += 1;
                    return Ok(Span {
                        start,
                        end,
                        escaped,
                    });
                }
                Some(b'\\') => {
                    escaped = true;
                    // What follows is checked by `unescape`, or here if it could be a quote.
                    self.at += 2;
                }
                Some(_) => return Err(self.error("control character in a string")),
                None => return Err(self.error("string without an end")),
            }
        }
    }

    /// Appends a string to `out`, its escapes resolved.
    pub(super) fn unescape(&self, span: Span, out: &mut Vec<u8>) -> Result<(), Reject> {
        let mut rest = self.slice(span);
        while let Some(at) = rest.iter().position(|b| *b == b'\\') {
            out.extend_from_slice(&rest[..at]);
            let escape = rest.get(at + 1).copied();
            rest = rest.get(at + 2..).unwrap_or_default();
            let byte = match escape {
                Some(b @ (b'"' | b'\\' | b'/')) => b,
                Some(b'b') => 8,
                Some(b'f') => 12,
                Some(b'n') => b'\n',
                Some(b'r') => b'\r',
                Some(b't') => b'\t',
                Some(b'u') => {
                    let (character, used) = unicode(rest)
                        .ok_or_else(|| self.error("invalid \\u escape in a string before"))?;
                    out.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
                    rest = &rest[used..];
                    continue;
                }
                _ => return Err(self.error("invalid escape in a string before")),
            };
            out.push(byte);
        }
        out.extend_from_slice(rest);
        Ok(())
    }

    /// Sign and digits of a number, as far as they are an integer; `None` beyond 64 bits.
    #[inline]
    pub(super) fn integer(&mut self) -> Result<(bool, Option<u64>), Reject> {
        let negative = self.peek() == Some(b'-');
        self.at += usize::from(negative);
        let start = self.at;
        let mut value: u64 = 0;
        let mut fits = true;
        while let Some(digit @ b'0'..=b'9') = self.peek() {
            let digit = u64::from(digit - b'0');
            if self.at - start < 19 {
                value = value * 10 + digit;
            } else {
                let next = value.checked_mul(10).and_then(|v| v.checked_add(digit));
                fits &= next.is_some();
                value = next.unwrap_or(value);
            }
            self.at += 1;
        }
        match self.at - start {
            0 => Err(self.error("expected a digit")),
            length if length > 1 && self.text[start] == b'0' => {
                Err(self.error("number with a leading zero"))
            }
            _ => Ok((negative, fits.then_some(value))),
        }
    }

    /// Any number.
    #[inline]
    pub(super) fn number(&mut self) -> Result<Span, Reject> {
        let start = self.at;
        self.integer()?;
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.digits()?;
        }
        if let Some(b'e' | b'E') = self.peek() {
            self.at += 1;
            if let Some(b'+' | b'-') = self.peek() {
                self.at += 1;
            }
            self.digits()?;
        }
        Ok(Span {
            start,
            end: self.at,
            escaped: false,
        })
    }

    fn digits(&mut self) -> Result<(), Reject> {
        let start = self.at;
        while let Some(b'0'..=b'9') = self.peek() {
            self.at += 1;
        }
        if self.at == start {
            Err(self.error("expected a digit"))
        } else {
            Ok(())
        }
    }

    /// Checks a value that nobody wants.
    pub(super) fn skip_value(&mut self, depth: usize) -> Result<(), Reject> {
        match self.peek() {
            Some(b'"') => {
                self.at += 1;
                let text = self.string()?;
                self.check_escapes(text)
            }
            Some(b'-' | b'0'..=b'9') => self.number().map(drop),
            Some(b't') => self.literal(b"true"),
            Some(b'f') => self.literal(b"false"),
            Some(b'n') => self.literal(b"null"),
            Some(open @ (b'{' | b'[')) => self.skip_nested(open == b'{', depth),
            _ => Err(self.error("expected a value")),
        }
    }

    fn skip_nested(&mut self, object: bool, depth: usize) -> Result<(), Reject> {
        if depth >= DEPTH_MAX {
            return Err(self.error("nested too deeply"));
        }
        let close = if object { b'}' } else { b']' };
        self.at += 1;
        self.space();
        if self.peek() == Some(close) {
            self.at += 1;
            return Ok(());
        }
        loop {
            if object {
                if self.next() != Some(b'"') {
                    return Err(self.error("expected a field name"));
                }
                let name = self.string()?;
                self.check_escapes(name)?;
                self.space();
                if self.next() != Some(b':') {
                    return Err(self.error("expected \":\""));
                }
                self.space();
            }
            self.skip_value(depth + 1)?;
            self.space();
            match self.next() {
                Some(b',') => self.space(),
                Some(b) if b == close => return Ok(()),
                _ => return Err(self.error("expected \",\" or the end of the list")),
            }
        }
    }

    /// Escapes are rare in text that nobody wants, so resolving them is check enough.
    #[inline]
    fn check_escapes(&self, text: Span) -> Result<(), Reject> {
        if text.escaped {
            self.unescape(text, &mut Vec::new())
        } else {
            Ok(())
        }
    }
}

/// Length of the front part without quotes, backslashes and control characters; eight at a time.
#[inline]
fn plain_prefix(text: &[u8]) -> usize {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const HIGH: u64 = 0x8080_8080_8080_8080;
    // Sets the high bit of each zero byte. Bytes above the lowest hit may be wrong (a borrow), the
    // lowest one never is, and that is the one used.
    let zeros = |word: u64| word.wrapping_sub(ONES) & !word & HIGH;
    let mut at = 0;
    while let Some(chunk) = text[at..].first_chunk::<8>() {
        let word = u64::from_le_bytes(*chunk);
        let quotes = zeros(word ^ (ONES * b'"' as u64));
        let slashes = zeros(word ^ (ONES * b'\\' as u64));
        let controls = word.wrapping_sub(ONES * 0x20) & !word & HIGH;
        let hits = quotes | slashes | controls;
        if hits != 0 {
            return at + hits.trailing_zeros() as usize / 8;
        }
        at += 8;
    }
    let tail = text[at..]
        .iter()
        .position(|b| matches!(b, b'"' | b'\\' | 0..=0x1f));
    tail.map_or(text.len(), |tail| at + tail)
}

/// The character of four hex digits, or of a surrogate pair (`dddd\udddd`), and the bytes it took.
fn unicode(text: &[u8]) -> Option<(char, usize)> {
    let first = hex4(text)?;
    if let Some(character) = char::from_u32(first) {
        return Some((character, 4));
    }
    let second = hex4(text.get(4..)?.strip_prefix(b"\\u")?)?;
    if !(0xd800..0xdc00).contains(&first) || !(0xdc00..0xe000).contains(&second) {
        return None;
    }
    let code = 0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00);
    Some((char::from_u32(code)?, 10))
}

fn hex4(text: &[u8]) -> Option<u32> {
    text.get(..4)?
        .iter()
        .try_fold(0, |code, b| Some(code * 16 + char::from(*b).to_digit(16)?))
}
