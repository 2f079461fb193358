//! Options of connectors: which there are, and reading them with errors that help.

use std::collections::BTreeMap;
use std::str::FromStr;

use millrace_dataflow::error::{Error, Result};

/// A connector and what it can be told.
#[derive(Debug)]
pub struct ConnectorInfo {
    pub name: &'static str,
    pub options: &'static [OptionInfo],
}

/// One option.
#[derive(Debug)]
pub struct OptionInfo {
    pub name: &'static str,
    pub doc: &'static str,
}

/// Shorthand for the tables of options.
pub(crate) const fn option(name: &'static str, doc: &'static str) -> OptionInfo {
    OptionInfo { name, doc }
}

/// Checked options of one source.
#[derive(Debug)]
pub(crate) struct Options<'a> {
    info: &'static ConnectorInfo,
    values: &'a BTreeMap<String, String>,
}

impl<'a> Options<'a> {
    /// Every key is an option of the connector (or `connector` itself).
    pub(crate) fn new(
        info: &'static ConnectorInfo,
        values: &'a BTreeMap<String, String>,
    ) -> Result<Self> {
        let names = || info.options.iter().map(|o| o.name);
        for key in values.keys().filter(|key| *key != "connector") {
            if !names().any(|name| name == key) {
                return Err(Error::invalid(format!(
                    "option \"{key}\" of connector \"{}\" does not exist",
                    info.name
                ))
                .hint(hint(key, names(), "its options are")));
            }
        }
        Ok(Self { info, values })
    }

    pub(crate) fn connector(&self) -> &'static str {
        self.info.name
    }

    pub(crate) fn text(&self, name: &str) -> Option<&'a str> {
        debug_assert!(
            self.info.options.iter().any(|o| o.name == name),
            "undocumented: {name}"
        );
        self.values.get(name).map(String::as_str)
    }

    pub(crate) fn required(&self, name: &str) -> Result<&'a str> {
        let doc = self
            .info
            .options
            .iter()
            .find(|o| o.name == name)
            .map_or("", |o| o.doc);
        self.text(name)
            .filter(|text| !text.is_empty())
            .ok_or_else(|| {
                Error::invalid(format!(
                    "connector \"{}\" needs option \"{name}\"",
                    self.info.name
                ))
                .hint(format!("{name}: {doc}"))
            })
    }

    /// A number, or `None` if the option is absent.
    pub(crate) fn number<T: FromStr>(&self, name: &str) -> Result<Option<T>> {
        let parse = |text: &str| {
            let text = text.trim();
            text.parse().map_err(|_| {
                let digits = !text.is_empty() && text.chars().all(|c| c.is_ascii_digit());
                match digits {
                    true => self.wrong(name, &format!("smaller than {text}")),
                    false => self.wrong(name, "a whole number that is not negative"),
                }
            })
        };
        self.text(name).map(parse).transpose()
    }

    /// One of the given words; the first one is the default.
    pub(crate) fn word(&self, name: &str, words: &[&'static str]) -> Result<&'static str> {
        match self.text(name) {
            None => Ok(words[0]),
            Some(text) => self.pick(name, text, words),
        }
    }

    /// One of the given words, without a default.
    pub(crate) fn required_word(&self, name: &str, words: &[&'static str]) -> Result<&'static str> {
        self.pick(name, self.required(name)?, words)
    }

    fn pick(&self, name: &str, text: &str, words: &[&'static str]) -> Result<&'static str> {
        let found = words
            .iter()
            .find(|word| word.eq_ignore_ascii_case(text))
            .copied();
        found.ok_or_else(|| {
            Error::invalid(format!(
                "option \"{name}\" of connector \"{}\" cannot be \"{text}\"",
                self.info.name
            ))
            .hint(hint(text, words.iter().copied(), "it can be"))
        })
    }

    pub(crate) fn flag(&self, name: &str, default: bool) -> Result<bool> {
        let words = if default {
            ["true", "false"]
        } else {
            ["false", "true"]
        };
        Ok(self.word(name, &words)? == "true")
    }

    pub(crate) fn wrong(&self, name: &str, expected: &str) -> Error {
        let error = Error::invalid(format!(
            "option \"{name}\" of connector \"{}\" must be {expected}",
            self.info.name
        ));
        match self.info.options.iter().find(|o| o.name == name) {
            Some(option) => error.hint(format!("{name}: {}", option.doc)),
            None => error,
        }
    }
}

/// `did you mean "x"? <intro> "x", "y"`.
pub(crate) fn hint<'n>(
    wrong: &str,
    names: impl Iterator<Item = &'n str> + Clone,
    intro: &str,
) -> String {
    let list = names
        .clone()
        .map(|n| format!("\"{n}\""))
        .collect::<Vec<_>>()
        .join(", ");
    match closest(wrong, names) {
        Some(name) => format!("did you mean \"{name}\"? {intro} {list}"),
        None => format!("{intro} {list}"),
    }
}

/// The name that is a typing slip away.
pub(crate) fn closest<'n>(wrong: &str, names: impl Iterator<Item = &'n str>) -> Option<&'n str> {
    let allowed = (wrong.len() / 3).max(1);
    names
        .map(|name| (distance(&wrong.to_lowercase(), &name.to_lowercase()), name))
        .filter(|(distance, _)| *distance <= allowed)
        .min()
        .map(|(_, name)| name)
}

/// Edits between two names, where swapping two neighbours is one.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows: Vec<Vec<usize>> = vec![(0..=b.len()).collect()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let replace = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = replace.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}
