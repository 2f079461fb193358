//! The memory that state may take, and where its cold pages go.
//!
//! # Contract
//!
//! * A process has at most one pager; a thread works under the one it has entered ([`Pager::enter`]), and
//!   state made on that thread belongs to it. Without one nothing is counted and nothing goes out.
//! * Every page and index is charged while it is in memory, whoever holds it (also a reader or a
//!   checkpoint under way). Those who write ask [`Pager::excess`] every few rows and put pages out.
//! * A page that cannot be written stays in memory: the budget is passed rather than data lost, and
//!   [`Pager::trouble`] says so. A page that cannot be read back is a panic on a worker, hence a restart
//!   from the last checkpoint.

use std::cell::RefCell;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::swap::{Slot, SwapFile};
use crate::error::Result;
use crate::ingest::lock;

thread_local! {
    static CURRENT: RefCell<Option<Arc<Pager>>> = const { RefCell::new(None) };
}

/// See the module.
#[derive(Debug)]
pub struct Pager {
    /// Bytes of pages and indexes that are wanted in memory at most.
    limit: u64,
    /// What can be put out.
    resident: AtomicU64,
    /// What cannot: indexes.
    fixed: AtomicU64,
    file: Arc<SwapFile>,
    /// Why the last page could not be put out.
    trouble: Mutex<Option<String>>,
}

/// What a pager has done and holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PagerStats {
    /// Bytes of pages and indexes in memory, and how many are wanted at most.
    pub resident: u64,
    pub limit: u64,
    /// Bytes of pages in the swap file.
    pub swapped: u64,
    /// Pages written and read since the start.
    pub written: u64,
    pub read: u64,
}

impl Pager {
    /// A pager whose swap file, in `dir`, is gone with the process.
    pub fn new(dir: &Path, limit: u64) -> Result<Arc<Self>> {
        Ok(Arc::new(Self {
            limit,
            resident: AtomicU64::new(0),
            fixed: AtomicU64::new(0),
            file: SwapFile::create(dir)?,
            trouble: Mutex::new(None),
        }))
    }

    /// State made on this thread from now on belongs to this pager.
    pub fn enter(pager: Option<Arc<Self>>) {
        CURRENT.with(|current| *current.borrow_mut() = pager);
    }

    /// Bytes that ought to go out now; zero while there is room. Comes back to zero only a little below
    /// the limit, so that work is done in pieces worth the trouble.
    #[inline]
    pub fn excess(&self) -> u64 {
        let resident = self.resident.load(Ordering::Relaxed);
        let room = self.room();
        if resident <= room {
            return 0;
        }
        resident - (room - room / 32)
    }

    /// For pages: what indexes leave, but never so little that all work would be paging.
    #[inline]
    fn room(&self) -> u64 {
        let left = self
            .limit
            .saturating_sub(self.fixed.load(Ordering::Relaxed));
        left.max(self.limit / 8)
    }

    /// Much more is in memory than wanted: others do not put out what they ought to.
    fn urgent(&self) -> bool {
        let room = self.room();
        self.resident.load(Ordering::Relaxed) > room + room / 8
    }

    /// Puts bytes out; `None` when that fails.
    fn put_out(&self, bytes: &[u8]) -> Option<Slot> {
        match self.file.write(bytes) {
            Ok(slot) => {
                let mut trouble = lock(&self.trouble);
                if trouble.take().is_some() {
                    tracing::info!("the swap file can be written again");
                }
                Some(slot)
            }
            Err(error) => {
                let mut trouble = lock(&self.trouble);
                if trouble.is_none() {
                    tracing::error!(%error, "the swap file cannot be written, state stays in memory");
                }
                *trouble = Some(error.to_string());
                None
            }
        }
    }

    /// Why the swap file cannot be written at the moment.
    pub fn trouble(&self) -> Option<String> {
        lock(&self.trouble).clone()
    }

    pub fn stats(&self) -> PagerStats {
        let (swapped, written, read) = self.file.stats();
        PagerStats {
            resident: self.resident.load(Ordering::Relaxed) + self.fixed.load(Ordering::Relaxed),
            limit: self.limit,
            swapped,
            written,
            read,
        }
    }
}

/// What one state has in memory and in the swap file.
#[derive(Debug, Default)]
pub(crate) struct Account {
    pager: Option<Arc<Pager>>,
    resident: AtomicU64,
    swapped: AtomicU64,
}

impl Account {
    /// Under the pager of this thread, if it has one.
    pub(crate) fn open() -> Arc<Self> {
        Arc::new(Self {
            pager: CURRENT.with(|current| current.borrow().clone()),
            ..Self::default()
        })
    }

    /// More is in memory than wanted.
    #[inline]
    pub(crate) fn is_over(&self) -> bool {
        self.pager.as_ref().is_some_and(|pager| pager.excess() > 0)
    }

    /// Bytes that this state ought to put out now: its share, or all when nobody else does theirs.
    pub(crate) fn due(&self) -> u64 {
        /// Not worth looking for less.
        const LEAST: u64 = 256 * 1024;
        let Some(pager) = &self.pager else {
            return 0;
        };
        let excess = pager.excess();
        if excess == 0 || pager.urgent() {
            return excess;
        }
        let all = pager.resident.load(Ordering::Relaxed).max(1);
        let share = u128::from(excess) * u128::from(self.resident()) * 2 / u128::from(all);
        (share as u64).max(LEAST).min(excess)
    }

    /// Bytes in memory, whoever holds them.
    pub(crate) fn resident(&self) -> u64 {
        self.resident.load(Ordering::Relaxed)
    }
    /// Bytes in the swap file.
    pub(crate) fn swapped(&self) -> u64 {
        self.swapped.load(Ordering::Relaxed)
    }

    /// Puts bytes out; `None` when that fails.
    pub(super) fn put_out(self: &Arc<Self>, bytes: &[u8]) -> Option<Out> {
        let slot = self.pager.as_ref()?.put_out(bytes)?;
        self.swapped.fetch_add(slot.space(), Ordering::Relaxed);
        Some(Out {
            slot,
            account: Arc::clone(self),
        })
    }

    /// The pager's counter of what can be put out, or cannot.
    fn counter(&self, fixed: bool) -> Option<&AtomicU64> {
        let pager = self.pager.as_ref()?;
        Some(if fixed { &pager.fixed } else { &pager.resident })
    }
    fn add(&self, bytes: u64, fixed: bool) {
        self.resident.fetch_add(bytes, Ordering::Relaxed);
        if let Some(counter) = self.counter(fixed) {
            counter.fetch_add(bytes, Ordering::Relaxed);
        }
    }
    fn subtract(&self, bytes: u64, fixed: bool) {
        self.resident.fetch_sub(bytes, Ordering::Relaxed);
        if let Some(counter) = self.counter(fixed) {
            counter.fetch_sub(bytes, Ordering::Relaxed);
        }
    }
}

/// Bytes that were put out; forgotten when dropped.
#[derive(Debug)]
pub(super) struct Out {
    slot: Slot,
    account: Arc<Account>,
}

impl Out {
    /// Reads the bytes back into `buffer`, which gets their length.
    pub(super) fn read(&self, buffer: &mut Vec<u8>) -> Result<()> {
        self.slot.read(buffer)
    }
    pub(super) fn account(&self) -> &Arc<Account> {
        &self.account
    }
}

impl Drop for Out {
    fn drop(&mut self) {
        let space = self.slot.space();
        self.account.swapped.fetch_sub(space, Ordering::Relaxed);
    }
}

/// Memory that is charged to an account as long as this lives.
#[derive(Debug, Default)]
pub(crate) struct Charge {
    account: Option<Arc<Account>>,
    bytes: u64,
    /// It cannot be put out.
    fixed: bool,
}

impl Charge {
    pub(crate) fn new(account: Option<Arc<Account>>) -> Self {
        Self {
            account,
            bytes: 0,
            fixed: false,
        }
    }
    /// As [`Self::new`], for what cannot be put out.
    pub(super) fn fixed(account: Option<Arc<Account>>) -> Self {
        let mut charge = Self::new(account);
        charge.fixed = true;
        charge
    }
    pub(super) fn account(&self) -> Option<&Arc<Account>> {
        self.account.as_ref()
    }
    /// From now on it is so much.
    #[inline]
    pub(crate) fn set(&mut self, bytes: usize) {
        let bytes = bytes as u64;
        if bytes != self.bytes {
            self.change(bytes);
        }
    }
    #[cold]
    fn change(&mut self, bytes: u64) {
        if let Some(account) = &self.account {
            if bytes > self.bytes {
                account.add(bytes - self.bytes, self.fixed);
            } else {
                account.subtract(self.bytes - bytes, self.fixed);
            }
        }
        self.bytes = bytes;
    }
}

impl Clone for Charge {
    fn clone(&self) -> Self {
        let mut clone = Self::new(self.account.clone());
        clone.fixed = self.fixed;
        clone.change(self.bytes);
        clone
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.change(0);
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use proptest::prelude::*;

    /// No pager, or one that wants so many bytes in memory.
    pub(crate) fn budget() -> impl Strategy<Value = Option<u64>> {
        prop_oneof![
            2 => Just(None),
            1 => Just(Some(0)),
            1 => (10_000u64..200_000).prop_map(Some),
        ]
    }

    /// The thread works under a pager as long as this lives.
    pub(crate) struct Entered(
        pub Option<Arc<Pager>>,
        #[expect(dead_code)] tempfile::TempDir,
    );

    pub(crate) fn enter(budget: Option<u64>) -> Entered {
        let dir = tempfile::tempdir().expect("there is room");
        let pager =
            budget.map(|limit| Pager::new(dir.path(), limit).expect("the directory is there"));
        Pager::enter(pager.clone());
        Entered(pager, dir)
    }

    impl Drop for Entered {
        fn drop(&mut self) {
            Pager::enter(None);
        }
    }
}
