//! What exists: an immutable picture that statements are bound against.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use arrow::datatypes::SchemaRef;
use millrace_dataflow::engine::Item;
use millrace_dataflow::error::Error;
use millrace_dataflow::plan::{RelationId, SourcePlan};
use millrace_dataflow::source::Source;
use millrace_sql::catalog::{CatalogPicture, LakeName};

use crate::catalog::{Kind, Object};

/// See the module.
#[derive(Debug, Default)]
pub struct World {
    /// Objects that work, for binding.
    pub picture: Arc<CatalogPicture>,
    /// All objects by name, also those that failed.
    pub entries: BTreeMap<String, Entry>,
}

/// One object.
#[derive(Debug, Clone)]
pub struct Entry {
    pub object: Object,
    /// Why it does not run, if it could not be planned as it was when it was created.
    pub failed: Option<Error>,
    pub detail: Detail,
}

/// What a kind of object has beside its row.
#[derive(Debug, Clone)]
pub enum Detail {
    Source {
        connector: String,
        plan: SourcePlan,
        source: Arc<dyn Source>,
    },
    View {
        schema: SchemaRef,
        lake: BTreeMap<LakeName, SchemaRef>,
    },
    MaterializedView {
        schema: SchemaRef,
        append_only: bool,
    },
    Sink {
        from: String,
        into: String,
    },
    /// Not known: it failed.
    Unknown,
}

/// An object that is ready to run: its entry, its place in the picture, its parts in the engine.
#[derive(Debug)]
pub(super) struct Made {
    pub entry: Entry,
    pub picture: millrace_sql::catalog::Item,
    pub items: Vec<Item>,
}

/// The objects so that each stands behind what it reads, else in order of creation. A view that was
/// replaced may read what was created after it.
pub(super) fn in_order(objects: Vec<Object>) -> Vec<Object> {
    let mut left: BTreeMap<RelationId, Object> = objects.into_iter().map(|o| (o.id, o)).collect();
    let mut ordered = Vec::with_capacity(left.len());
    while !left.is_empty() {
        let names: BTreeSet<String> = left.values().map(|o| o.name.clone()).collect();
        let free = |o: &&Object| !o.depends_on.iter().any(|read| names.contains(read));
        // Nothing reads itself; were it so, the order would not matter.
        let next = left.values().find(free).or(left.values().next());
        let Some(id) = next.map(|o| o.id) else {
            break;
        };
        ordered.extend(left.remove(&id));
    }
    ordered
}

impl World {
    /// The picture that an object was made for: views that were replaced since as it knew them.
    pub(super) fn picture_for(
        &self,
        object: &Object,
        lake: &BTreeMap<LakeName, SchemaRef>,
    ) -> Arc<CatalogPicture> {
        let picture = self.picture_with(lake);
        if object.seen.is_empty() {
            return picture;
        }
        let mut picture = (*picture).clone();
        for (name, seen) in &object.seen {
            if let Some(millrace_sql::catalog::Item::MaterializedView(view)) =
                picture.items.get_mut(name)
            {
                let columns = view.schema.fields().iter().take(seen.columns).cloned();
                view.schema = Arc::new(arrow::datatypes::Schema::new(columns.collect::<Vec<_>>()));
                view.append_only = seen.append_only;
                view.event_time.clone_from(&seen.event_time);
            }
        }
        Arc::new(picture)
    }

    /// This world and one more object.
    pub fn with(&self, entry: Entry, item: Option<millrace_sql::catalog::Item>) -> Self {
        let mut picture = (*self.picture).clone();
        let mut entries = self.entries.clone();
        if let Some(item) = item {
            picture.items.insert(entry.object.name.clone(), item);
        }
        entries.insert(entry.object.name.clone(), entry);
        Self {
            picture: Arc::new(picture),
            entries,
        }
    }

    /// This world without some objects.
    pub fn without(&self, names: &BTreeSet<String>) -> Self {
        let mut picture = (*self.picture).clone();
        let mut entries = self.entries.clone();
        picture.items.retain(|name, _| !names.contains(name));
        entries.retain(|name, _| !names.contains(name));
        Self {
            picture: Arc::new(picture),
            entries,
        }
    }

    /// The picture with the lake tables that a statement names, as they are now, and those that
    /// logical views name, as they were when the view was created.
    pub fn picture_with(&self, lake: &BTreeMap<LakeName, SchemaRef>) -> Arc<CatalogPicture> {
        let views = || {
            self.entries
                .values()
                .filter_map(|entry| match &entry.detail {
                    Detail::View { lake, .. } => Some(lake),
                    _ => None,
                })
        };
        if lake.is_empty() && views().all(BTreeMap::is_empty) {
            return Arc::clone(&self.picture);
        }
        let mut picture = (*self.picture).clone();
        for lake in views() {
            picture.lake.extend(
                lake.iter()
                    .map(|(name, schema)| (name.clone(), Arc::clone(schema))),
            );
        }
        picture.lake.extend(
            lake.iter()
                .map(|(name, schema)| (name.clone(), Arc::clone(schema))),
        );
        Arc::new(picture)
    }

    /// An object by one of the ids the engine knows it by.
    pub fn by_id(&self, id: RelationId) -> Option<&Entry> {
        self.entries
            .values()
            .find(|entry| entry.object.ids().contains(&id))
    }

    /// Names of the objects that read `name`, directly.
    pub fn readers(&self, name: &str) -> Vec<&Entry> {
        self.entries
            .values()
            .filter(|entry| entry.object.depends_on.iter().any(|d| d == name))
            .collect()
    }

    /// `name` and everything it reads, directly or not.
    pub fn upstream(&self, name: &str) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        let mut open = vec![name.to_string()];
        while let Some(name) = open.pop() {
            if let Some(entry) = self.entries.get(&name)
                && found.insert(name)
            {
                open.extend(entry.object.depends_on.iter().cloned());
            }
        }
        found
    }

    /// Says of an unknown relation that it exists but has failed, when that is the case.
    pub fn explain_missing(&self, error: Error) -> Error {
        if error.code != "42P01" || error.detail.is_some() {
            return error;
        }
        let named = self.entries.values().find(|entry| {
            entry.failed.is_some()
                && error
                    .message
                    .contains(&format!("\"{}\"", entry.object.name))
        });
        match named.and_then(|entry| Some((entry, entry.failed.as_ref()?))) {
            Some((entry, why)) => error
                .detail(format!(
                    "{} \"{}\" exists but has failed: {}",
                    entry.object.kind.as_str(),
                    entry.object.name,
                    why.message
                ))
                .hint("drop it and create it again"),
            None => error,
        }
    }
}

impl Entry {
    /// Whether this is a relation that can be dropped as `kind`.
    pub fn is(&self, kind: Kind) -> bool {
        self.object.kind == kind
    }
}
