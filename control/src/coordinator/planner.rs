//! How a worker process makes items again: from the same rows of the catalog, by the same planning.

use std::path::Path;

use async_trait::async_trait;
use millrace_dataflow::cluster::remote::Planner;
use millrace_dataflow::engine::Item;
use millrace_dataflow::error::{Error, Result};
use millrace_dataflow::plan::RelationId;
use millrace_lake::SqlCatalog;
use millrace_sql::guard::Policy;

use super::facts::Outside;
use super::restore::again;
use super::world::World;
use crate::catalog::Object;

/// The world as the server has told it, object by object.
#[derive(Debug)]
pub struct WorldPlanner {
    world: World,
    outside: Outside,
    policy: Policy,
}

impl WorldPlanner {
    /// On the data directory of the server, for the tables of the lake.
    pub async fn open(data_dir: &Path) -> Result<Self> {
        let pool = millrace_lake::catalog::sql::open_pool(&data_dir.join("metadata.db")).await?;
        let lake = SqlCatalog::open(pool, data_dir.join("warehouse")).await?;
        Ok(Self {
            world: World::default(),
            outside: Outside { lake },
            policy: Policy,
        })
    }
}

#[async_trait]
impl Planner for WorldPlanner {
    async fn define(&mut self, definition: &[u8]) -> Result<Vec<Item>> {
        let object: Object = serde_json::from_slice(definition)
            .map_err(|e| Error::internal(format!("a definition cannot be read: {e}")))?;
        let made = again(&object, &self.world, &self.outside, &self.policy)
            .await
            .map_err(|e| Error {
                message: format!(
                    "a worker process cannot plan \"{}\": {}",
                    object.name, e.message
                ),
                ..e
            })?;
        self.world = self.world.with(made.entry, Some(made.picture));
        Ok(made.items)
    }

    fn forget(&mut self, ids: &[RelationId]) {
        let gone = self.world.entries.values();
        // A replaced view goes on under its id: what ends is the old dataflow.
        let gone = gone.filter(|entry| ids.contains(&entry.object.dataflow));
        let names = gone.map(|entry| entry.object.name.clone()).collect();
        self.world = self.world.without(&names);
    }
}
