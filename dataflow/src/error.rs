//! Error kinds, shared by the workspace, and the error every crate can return across a boundary.

use std::fmt;

/// What a caller can do about an error. HTTP status and SQLSTATE derive from it, each in one table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum ErrorKind {
    /// The request is wrong; saying it again will not help.
    Invalid,
    /// A named thing does not exist.
    NotFound,
    /// It exists already, or somebody else changed it meanwhile.
    Conflict,
    /// The principal may not.
    Denied,
    /// Understood, but not something this build can do.
    Unsupported,
    /// The outside does not answer; the only kind worth retrying.
    Unavailable,
    /// Stored bytes are not what was written.
    Corrupt,
    /// A bug.
    Internal,
}

/// An error in PostgreSQL's manner: kind, SQLSTATE, message, detail, hint, position.
///
/// The message is lowercase, without a period, with quoted identifiers, and carries no secret and
/// no row values.
#[derive(Debug, Clone)]
pub struct Error {
    pub kind: ErrorKind,
    /// SQLSTATE, such as `42P01`.
    pub code: &'static str,
    pub message: String,
    pub detail: Option<String>,
    pub hint: Option<String>,
    /// Character position in the statement, counted from 1.
    pub position: Option<usize>,
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error with the default SQLSTATE of its kind.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        let code = match kind {
            ErrorKind::Invalid => "22023",
            ErrorKind::NotFound => "42704",
            ErrorKind::Conflict => "42710",
            ErrorKind::Denied => "42501",
            ErrorKind::Unsupported => "0A000",
            ErrorKind::Unavailable => "08006",
            ErrorKind::Corrupt => "XX001",
            ErrorKind::Internal => "XX000",
        };
        Self {
            kind,
            code,
            message: message.into(),
            detail: None,
            hint: None,
            position: None,
        }
    }
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, message)
    }
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, message)
    }
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unavailable, message)
    }
    /// Of kind `Unavailable`, for what an operating system said; tells a full disk from the rest.
    pub fn outside(message: impl Into<String>) -> Self {
        let error = Self::unavailable(message);
        // ENOSPC and EDQUOT, as they come through the layers between.
        if ["os error 28", "os error 122"]
            .iter()
            .any(|full| error.message.contains(full))
        {
            return error
                .code("53100")
                .hint("free space on the disk; the server goes on by itself");
        }
        error
    }
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Internal, message)
    }
    #[must_use]
    pub fn code(mut self, code: &'static str) -> Self {
        self.code = code;
        self
    }
    /// With a code that came as text; one that this build does not act upon becomes that of the kind.
    #[must_use]
    pub fn code_of(self, code: &str) -> Self {
        const KNOWN: [&str; 14] = [
            "08006", "22003", "22023", "23502", "40001", "42704", "42P01", "53100", "55000",
            "57014", "57P01", "58030", "0A000", "XX001",
        ];
        match KNOWN.into_iter().find(|known| *known == code) {
            Some(code) => self.code(code),
            None => self,
        }
    }
    #[must_use]
    pub fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
    #[must_use]
    pub fn position(mut self, position: usize) -> Self {
        self.position = Some(position);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl From<std::io::Error> for Error {
    fn from(e: std::io::Error) -> Self {
        Self::outside(e.to_string())
    }
}
