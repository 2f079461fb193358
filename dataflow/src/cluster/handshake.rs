//! Who is at the other end: the first bytes on every connection between the processes of a data plane.
//!
//! ```text
//! caller ─► magic, version, incarnation, role, process, nonce
//! callee ─► verdict, nonce, proof            (verdict ≠ 0: refused, and why)
//! caller ─► proof
//! callee ─► verdict
//! ```
//!
//! # Contract
//!
//! * A proof is a keyed hash over everything said so far; its key is the secret of this incarnation,
//!   which never goes over the wire. Both ends prove that they know it, and proofs are compared in
//!   constant time.
//! * A caller of another incarnation, or without the secret, is refused, and both ends say so.

use std::fmt;
use std::io::{Read, Write};

use crate::env;
use crate::error::{Error, ErrorKind, Result};

const MAGIC: [u8; 4] = *b"MRDP";
/// Of everything that processes say to each other.
pub const VERSION: u16 = 1;

/// Known to the processes of one incarnation only.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret([u8; 32]);

impl Secret {
    /// A new one.
    pub fn random() -> Self {
        let mut bytes = [0; 32];
        bytes[..16].copy_from_slice(env::random_id().as_bytes());
        bytes[16..].copy_from_slice(env::random_id().as_bytes());
        // Identifiers have a few bits that are always the same.
        Self(*blake3::hash(&bytes).as_bytes())
    }
    /// For the standard input of a child; never for an argument or a log.
    pub fn to_hex(&self) -> String {
        blake3::Hash::from_bytes(self.0).to_hex().to_string()
    }
    /// Reads what [`Self::to_hex`] wrote.
    pub fn from_hex(text: &str) -> Result<Self> {
        let hash = blake3::Hash::from_hex(text.trim());
        let hash = hash.map_err(|_| Error::invalid("the secret of the data plane is malformed"))?;
        Ok(Self(*hash.as_bytes()))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[secret]")
    }
}

/// What makes processes belong together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    pub incarnation: u64,
    pub secret: Secret,
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Commands and their answers.
    Control,
    /// Rows between workers.
    Mesh,
}

impl Role {
    fn code(self) -> u8 {
        match self {
            Self::Control => 1,
            Self::Mesh => 2,
        }
    }
}

/// Why a caller is not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Welcome = 0,
    Version = 1,
    Incarnation = 2,
    Secret = 3,
    Role = 4,
}

impl Verdict {
    fn error(self) -> Error {
        let message = match self {
            Self::Welcome => "the connection was refused",
            Self::Version => "the other process runs another version",
            Self::Incarnation => "the other process belongs to another incarnation",
            Self::Secret => "the other process does not know the secret of this data plane",
            Self::Role => "the other process does not expect this connection",
        };
        Error::new(ErrorKind::Denied, message).code("28000")
    }
    fn read(code: u8) -> Self {
        match code {
            0 => Self::Welcome,
            1 => Self::Version,
            2 => Self::Incarnation,
            4 => Self::Role,
            _ => Self::Secret,
        }
    }
}

const HELLO: usize = 4 + 2 + 8 + 1 + 4 + 16;

fn proof(identity: &Identity, who: &str, hello: &[u8; HELLO], nonce: &[u8; 16]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new_keyed(&identity.secret.0);
    hasher.update(who.as_bytes());
    hasher.update(hello);
    hasher.update(nonce);
    hasher.finalize()
}

fn nonce() -> [u8; 16] {
    *env::random_id().as_bytes()
}

fn read<const N: usize>(stream: &mut impl Read) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// The caller's half, as process number `process`.
pub fn call(
    stream: &mut (impl Read + Write),
    identity: &Identity,
    role: Role,
    process: u32,
) -> Result<()> {
    let mut hello = Vec::with_capacity(HELLO);
    hello.extend_from_slice(&MAGIC);
    hello.extend_from_slice(&VERSION.to_le_bytes());
    hello.extend_from_slice(&identity.incarnation.to_le_bytes());
    hello.push(role.code());
    hello.extend_from_slice(&process.to_le_bytes());
    hello.extend_from_slice(&nonce());
    let hello: [u8; HELLO] = hello.try_into().expect("the parts add up");
    stream.write_all(&hello)?;
    let [verdict] = read(stream)?;
    if verdict != 0 {
        return Err(Verdict::read(verdict).error());
    }
    let theirs: [u8; 16] = read(stream)?;
    let proven: [u8; 32] = read(stream)?;
    if proof(identity, "callee", &hello, &theirs) != proven {
        return Err(Verdict::Secret.error());
    }
    stream.write_all(proof(identity, "caller", &hello, &theirs).as_bytes())?;
    match read(stream)? {
        [0] => Ok(()),
        [verdict] => Err(Verdict::read(verdict).error()),
    }
}

/// The callee's half: what the caller wants and which process it is, once it has proven to belong here.
pub fn answer(
    stream: &mut (impl Read + Write),
    identity: &Identity,
    expected: impl Fn(Role, u32) -> bool,
) -> Result<(Role, u32)> {
    let hello: [u8; HELLO] = read(stream)?;
    let number = |from: usize, length: usize| {
        let bytes = &hello[from..from + length];
        bytes
            .iter()
            .rev()
            .fold(0_u64, |n, b| n << 8 | u64::from(*b))
    };
    let role = match hello[14] {
        1 => Some(Role::Control),
        2 => Some(Role::Mesh),
        _ => None,
    };
    let process = number(15, 4) as u32;
    let refused = match role {
        _ if hello[..4] != MAGIC || number(4, 2) != u64::from(VERSION) => Verdict::Version,
        _ if number(6, 8) != identity.incarnation => Verdict::Incarnation,
        Some(role) if expected(role, process) => Verdict::Welcome,
        _ => Verdict::Role,
    };
    let role = match role {
        Some(role) if refused == Verdict::Welcome => role,
        _ => {
            stream.write_all(&[refused as u8])?;
            return Err(refused.error());
        }
    };
    let ours = nonce();
    let mut reply = vec![Verdict::Welcome as u8];
    reply.extend_from_slice(&ours);
    reply.extend_from_slice(proof(identity, "callee", &hello, &ours).as_bytes());
    stream.write_all(&reply)?;
    let proven: [u8; 32] = read(stream)?;
    if proof(identity, "caller", &hello, &ours) != proven {
        stream.write_all(&[Verdict::Secret as u8])?;
        return Err(Verdict::Secret.error());
    }
    stream.write_all(&[Verdict::Welcome as u8])?;
    Ok((role, process))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn identity(incarnation: u64) -> Identity {
        Identity {
            incarnation,
            secret: Secret::random(),
        }
    }

    fn meet(caller: Identity, callee: &Identity, role: Role) -> (Result<()>, Result<(Role, u32)>) {
        let (mut a, mut b) = UnixStream::pair().expect("a pair of sockets");
        let caller = std::thread::spawn(move || call(&mut a, &caller, role, 3));
        let answered = answer(&mut b, callee, |role, process| {
            role == Role::Mesh && process == 3
        });
        drop(b);
        (caller.join().expect("no panic"), answered)
    }

    #[test]
    fn those_who_belong_together_meet() {
        let one = identity(7);
        let (called, answered) = meet(one.clone(), &one, Role::Mesh);
        called.expect("let in");
        assert_eq!(answered.expect("known"), (Role::Mesh, 3));
    }

    #[test]
    fn a_wrong_secret_is_refused_by_both_ends() {
        let (called, answered) = meet(identity(7), &identity(7), Role::Mesh);
        // The caller sees first that the callee does not know the secret.
        assert!(called.expect_err("refused").message.contains("secret"));
        answered.expect_err("refused");
        // A caller that does not look is refused as well.
        let callee = identity(7);
        let (mut a, mut b) = UnixStream::pair().expect("a pair of sockets");
        let liar = std::thread::spawn(move || {
            let mut hello = Vec::new();
            hello.extend_from_slice(&MAGIC);
            hello.extend_from_slice(&VERSION.to_le_bytes());
            hello.extend_from_slice(&7_u64.to_le_bytes());
            hello.push(Role::Mesh.code());
            hello.extend_from_slice(&3_u32.to_le_bytes());
            hello.extend_from_slice(&[0; 16]);
            a.write_all(&hello).expect("written");
            let _reply: [u8; 49] = read(&mut a).expect("a reply");
            a.write_all(&[0; 32]).expect("written");
            read::<1>(&mut a).expect("a verdict")
        });
        let answered = answer(&mut b, &callee, |_, _| true);
        assert!(answered.expect_err("refused").message.contains("secret"));
        assert_eq!(liar.join().expect("no panic"), [Verdict::Secret as u8]);
    }

    #[test]
    fn an_older_incarnation_is_refused() {
        let new = identity(8);
        let old = Identity {
            incarnation: 7,
            ..new.clone()
        };
        let (called, answered) = meet(old, &new, Role::Mesh);
        for error in [called.expect_err("refused"), answered.expect_err("refused")] {
            assert!(error.message.contains("another incarnation"), "{error}");
        }
    }

    #[test]
    fn a_connection_nobody_waits_for_is_refused() {
        let one = identity(7);
        let (called, answered) = meet(one.clone(), &one, Role::Control);
        for error in [called.expect_err("refused"), answered.expect_err("refused")] {
            assert!(error.message.contains("does not expect"), "{error}");
        }
    }

    #[test]
    fn other_protocols_are_refused() {
        let (mut a, mut b) = UnixStream::pair().expect("a pair of sockets");
        a.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            .expect("written");
        let answered = answer(&mut b, &identity(7), |_, _| true);
        assert!(answered.expect_err("refused").message.contains("version"));
    }

    #[test]
    fn the_secret_is_not_shown() {
        let secret = Secret::random();
        assert_eq!(format!("{secret:?}"), "[secret]");
        assert_eq!(Secret::from_hex(&secret.to_hex()).expect("hex"), secret);
        assert_ne!(secret, Secret::random());
    }
}
