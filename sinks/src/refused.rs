//! Stands for a sink that cannot be opened: whoever starts it is told why.

use std::sync::Arc;

use async_trait::async_trait;
use millrace_dataflow::error::{Error, Result};
use millrace_dataflow::sink::{Committer, Sink, Writer};

/// See the module.
#[derive(Debug)]
pub struct RefusedSink {
    error: Error,
    accepts_retractions: bool,
}

impl RefusedSink {
    pub fn new(error: Error, accepts_retractions: bool) -> Arc<Self> {
        Arc::new(Self {
            error,
            accepts_retractions,
        })
    }
}

#[async_trait]
impl Sink for RefusedSink {
    fn accepts_retractions(&self) -> bool {
        self.accepts_retractions
    }
    async fn writer(&self, _worker: usize, _incarnation: u64) -> Result<Box<dyn Writer>> {
        Err(self.error.clone())
    }
    async fn committer(&self, _incarnation: u64) -> Result<Box<dyn Committer>> {
        Err(self.error.clone())
    }
}
