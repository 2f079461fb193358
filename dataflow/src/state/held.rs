//! A page of a key group: in memory, or in the swap file.
//!
//! # Contract
//!
//! * Whoever reads a page gets it, from the swap file if need be; it then stays in memory until
//!   [`Held::put_out`], which needs the state for writing, so that no reference can be outlived.
//! * A page that was put out and is only read keeps its place in the swap file: putting it out again
//!   costs nothing.

use std::cell::{Cell, OnceCell, RefCell};
use std::sync::Arc;

use super::page::Page;
use super::pager::{Account, Out};
use crate::error::Result;

/// A page in the swap file. Shared by the state, by readers and by checkpoints.
#[derive(Debug)]
pub(super) struct Swapped {
    out: Out,
    rows: u32,
}

thread_local! {
    /// Bytes of the page that is being written or read.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl Swapped {
    fn load(&self) -> Result<Arc<Page>> {
        SCRATCH.with(|scratch| {
            let mut scratch = scratch.borrow_mut();
            self.out.read(&mut scratch)?;
            Ok(Arc::new(Page::read(Some(self.out.account()), &scratch)?))
        })
    }
}

/// A page as it was at some moment; may go to other threads.
#[derive(Debug, Clone)]
pub(super) enum PageRef {
    Resident(Arc<Page>),
    Swapped(Arc<Swapped>),
}

impl PageRef {
    pub(super) fn rows(&self) -> usize {
        match self {
            Self::Resident(page) => page.rows(),
            Self::Swapped(swapped) => swapped.rows as usize,
        }
    }
    /// The page itself; it stays in memory as long as what is given.
    pub(super) fn load(&self) -> Result<Arc<Page>> {
        match self {
            Self::Resident(page) => Ok(Arc::clone(page)),
            Self::Swapped(swapped) => swapped.load(),
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Held {
    page: OnceCell<Arc<Page>>,
    /// The same page in the swap file.
    swapped: Option<Arc<Swapped>>,
    /// One bit per slot written since the bits were last taken.
    dirty: Vec<u64>,
    /// The page stands in the group's list of pages with room.
    pub(super) open: bool,
    /// Read or written since the clock's hand last passed.
    touched: Cell<bool>,
}

impl Held {
    pub(super) fn new(page: Page) -> Self {
        Self {
            page: OnceCell::from(Arc::new(page)),
            swapped: None,
            dirty: Vec::new(),
            open: true,
            touched: Cell::new(true),
        }
    }

    /// The page for reading.
    #[inline]
    pub(super) fn page(&self) -> &Page {
        if !self.touched.get() {
            self.touched.set(true);
        }
        match self.page.get() {
            Some(page) => page,
            None => self.load(),
        }
    }

    #[cold]
    fn load(&self) -> &Page {
        self.page.get_or_init(|| {
            let swapped = self.swapped.as_ref();
            let swapped = swapped.expect("a page is in memory or in the swap file");
            match swapped.load() {
                Ok(page) => page,
                // The contract of the pager: the process starts again from the last checkpoint.
                Err(error) => panic!("{error}"),
            }
        })
    }

    /// The page, if it is in memory.
    #[inline]
    pub(super) fn resident(&self) -> Option<&Page> {
        self.page.get().map(|page| &**page)
    }

    /// The page for writing.
    #[inline]
    pub(super) fn page_mut(&mut self) -> &mut Page {
        if self.page.get().is_none() {
            self.load();
        }
        self.touched.set(true);
        if self.swapped.is_some() {
            self.swapped = None;
        }
        Arc::make_mut(self.page.get_mut().expect("it was loaded above"))
    }

    /// The row in this slot was written or removed.
    pub(super) fn mark(&mut self, slot: u32) {
        let word = slot as usize / 64;
        if word >= self.dirty.len() {
            self.dirty.resize(word + 1, 0);
        }
        self.dirty[word] |= 1 << (slot % 64);
    }
    pub(super) fn dirty(&self) -> &[u64] {
        &self.dirty
    }
    pub(super) fn take_dirty(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.dirty)
    }

    /// The page as it is now.
    pub(super) fn now(&self) -> PageRef {
        match (self.page.get(), &self.swapped) {
            (Some(page), _) => PageRef::Resident(Arc::clone(page)),
            (None, Some(swapped)) => PageRef::Swapped(Arc::clone(swapped)),
            (None, None) => unreachable!("a page is in memory or in the swap file"),
        }
    }

    /// The page as it is now, for a reader that takes its time: what the swap file has already need not
    /// stay in memory for it.
    pub(super) fn now_at_leisure(&self) -> PageRef {
        match &self.swapped {
            Some(swapped) => PageRef::Swapped(Arc::clone(swapped)),
            None => self.now(),
        }
    }

    pub(super) fn rows(&self) -> usize {
        match (self.page.get(), &self.swapped) {
            (Some(page), _) => page.rows(),
            (None, Some(swapped)) => swapped.rows as usize,
            (None, None) => 0,
        }
    }

    /// The clock's hand passes: whether the page is in memory and was not used since it last did.
    pub(super) fn is_cold(&self) -> bool {
        self.page.get().is_some() && !self.touched.replace(false)
    }

    /// Puts the page out; the bytes that are free by it, zero when it cannot be written.
    pub(super) fn put_out(&mut self, account: &Arc<Account>) -> usize {
        let Some(page) = self.page.get() else {
            return 0;
        };
        if self.swapped.is_none() {
            let out = SCRATCH.with(|scratch| {
                let mut scratch = scratch.borrow_mut();
                scratch.clear();
                page.write(&mut scratch);
                account.put_out(&scratch)
            });
            let Some(out) = out else {
                return 0;
            };
            let rows = page.rows() as u32;
            self.swapped = Some(Arc::new(Swapped { out, rows }));
        }
        let bytes = page.bytes();
        self.page.take();
        bytes
    }
}
