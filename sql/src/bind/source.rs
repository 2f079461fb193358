//! `CREATE SOURCE`: physical columns, computed columns, the watermark.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, FieldRef, Schema, SchemaRef};
use datafusion::common::tree_node::{Transformed, TransformedResult, TreeNode};
use datafusion::common::{DFSchema, TableReference};
use datafusion::logical_expr::execution_props::ExecutionProps;
use datafusion::logical_expr::{Cast, Expr, ExprSchemable, LogicalPlan, LogicalPlanBuilder};
use datafusion::physical_expr::expressions::BinaryExpr;
use datafusion::physical_expr::{PhysicalExpr, ScalarFunctionExpr, create_physical_expr};
use datafusion::sql::planner::PlannerContext;
use datafusion::sql::sqlparser::ast;
use millrace_dataflow::error::{Error, Result};
use millrace_dataflow::plan::{RelationId, SourcePlan, WatermarkPlan};

use super::postgres::rewrite;
use super::{SourceDef, located, planner};
use crate::catalog::{CatalogPicture, CatalogSource, Context, EngineRelation, Scanned};
use crate::checked::{as_checked, fallible};
use crate::error::{TYPE_MISMATCH, UNDEFINED_COLUMN, nearest, planning};
use crate::functions::at_most;
use crate::lower::refuse_unmaintainable;
use crate::optimize::optimize_view;
use crate::parse::{ColumnDef, CreateSource, WatermarkDef, parse_one, write_options};
use crate::purify::Discovered;
use crate::types::{sql_name, timestamp};

/// A row whose time is further ahead of the clock does not move the watermark.
const MAX_AHEAD_US: i64 = 3_600_000_000;
/// Rows of one time may still come while the watermark has just reached it.
const WATERMARK_DELAY_US: i64 = 1;

pub(crate) fn bind(
    mut create: CreateSource,
    facts: Option<Discovered>,
    text: String,
) -> Result<SourceDef> {
    let facts = facts.unwrap_or_default();
    let text = match complete(&mut create, &facts)? {
        true => {
            // The text is stored and parsed again at every start.
            if let Some(column) = create
                .columns
                .iter()
                .find(|c| c.data_type.as_ref().is_some_and(DataType::is_nested))
            {
                return Err(Error::unsupported(format!(
                    "column \"{}\" is nested, and a source cannot have such columns yet",
                    column.name
                ))
                .hint("declare the columns of the source, without this one"));
            }
            write(&create)
        }
        false => text,
    };
    let physical = physical_schema(&create);
    let Columns {
        exprs,
        schema,
        deciding,
    } = columns(&create, &physical)?;
    let watermark = match &create.watermark {
        Some(def) => Some(watermark(
            def,
            &schema,
            facts.any_event_time || facts.bounded,
        )?),
        None => None,
    };
    let mut event_time = vec![None; schema.fields().len()];
    if let Some(w) = &watermark {
        event_time[w.column] = Some(WATERMARK_DELAY_US);
    }
    let connector = create.options.get("connector").cloned().unwrap_or_default();
    Ok(SourceDef {
        name: create.name,
        if_not_exists: create.if_not_exists,
        connector,
        options: create.options,
        physical,
        plan: SourcePlan {
            columns: exprs,
            schema,
            watermark,
            deciding,
        },
        event_time,
        append_only: facts.append_only,
        bounded: facts.bounded,
        text,
    })
}

/// Physical columns as declared, without the one that carries the sign of a change.
pub(crate) fn physical_schema(create: &CreateSource) -> SchemaRef {
    let sign = create.options.get("changelog");
    let fields: Vec<Field> = create
        .columns
        .iter()
        .filter(|c| c.computed.is_none() && Some(&c.name) != sign)
        .filter_map(|c| Some(Field::new(&c.name, c.data_type.clone()?, true)))
        .collect();
    Arc::new(Schema::new(fields))
}

/// Writes what was discovered into the statement. Says whether it changed.
fn complete(create: &mut CreateSource, facts: &Discovered) -> Result<bool> {
    let mut changed = false;
    if !create.columns.iter().any(|c| c.computed.is_none()) {
        let Some(schema) = &facts.schema else {
            return Err(
                Error::invalid(format!("source \"{}\" needs columns", create.name)).hint(
                    "declare them, as in CREATE SOURCE name (id BIGINT, at TIMESTAMP) WITH (…)",
                ),
            );
        };
        let sign = create.options.get("changelog");
        let mut columns: Vec<ColumnDef> = schema
            .fields()
            .iter()
            .filter(|f| Some(f.name()) != sign)
            .map(|f| ColumnDef {
                name: f.name().clone(),
                data_type: Some(f.data_type().clone()),
                length: None,
                computed: None,
            })
            .collect();
        for computed in create.columns.drain(..) {
            if columns.iter().any(|c| c.name == computed.name) {
                return Err(Error::invalid(format!(
                    "column \"{}\" is specified more than once",
                    computed.name
                ))
                .code(crate::error::DUPLICATE_COLUMN));
            }
            columns.push(computed);
        }
        create.columns = columns;
        changed = true;
    }
    if create.watermark.is_none()
        && let Some((column, delay_us)) = &facts.event_time
        && create
            .columns
            .iter()
            .any(|c| c.name == *column && c.data_type == Some(timestamp()))
    {
        create.watermark = Some(WatermarkDef {
            column: column.clone(),
            expr: watermark_expr(column, *delay_us)?,
        });
        changed = true;
    }
    Ok(changed)
}

fn watermark_expr(column: &str, delay_us: i64) -> Result<ast::Expr> {
    let quoted = quote(column);
    let text = format!(
        "CREATE SOURCE s (WATERMARK FOR {quoted} AS {quoted} - INTERVAL '{delay_us} microseconds') WITH (connector = 'x')"
    );
    match parse_one(&text)?.statement {
        crate::parse::Statement::CreateSource(CreateSource {
            watermark: Some(w), ..
        }) => Ok(w.expr),
        _ => Err(Error::internal("a watermark cannot be written")),
    }
}

fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// The statement as text that stands on its own.
fn write(create: &CreateSource) -> String {
    let mut elements: Vec<String> = create
        .columns
        .iter()
        .map(|c| {
            let mut parts = vec![quote(&c.name)];
            parts.extend(match c.length {
                Some(length) => Some(format!("VARCHAR({length})")),
                None => c.data_type.as_ref().map(sql_name),
            });
            parts.extend(c.computed.as_ref().map(|e| format!("AS {e}")));
            parts.join(" ")
        })
        .collect();
    if let Some(w) = &create.watermark {
        elements.push(format!("WATERMARK FOR {} AS {}", quote(&w.column), w.expr));
    }
    format!(
        "CREATE SOURCE {}{} (\n  {}\n) WITH ({})",
        if create.if_not_exists {
            "IF NOT EXISTS "
        } else {
            ""
        },
        quote(&create.name),
        elements.join(",\n  "),
        write_options(&create.options)
    )
}

/// How the columns of a relation come from the physical ones.
struct Columns {
    exprs: Vec<Arc<dyn PhysicalExpr>>,
    schema: SchemaRef,
    /// Those of which a failure rejects the record.
    deciding: Vec<usize>,
}

/// The relation's columns over the physical ones.
fn columns(create: &CreateSource, physical: &SchemaRef) -> Result<Columns> {
    let picture = CatalogPicture::default();
    let lake = BTreeMap::new();
    let context = Context::new(&picture, &lake);
    let sign = create.options.get("changelog");
    // Computed columns so far, to be put in the place of references to them.
    let mut computed: BTreeMap<String, Expr> = BTreeMap::new();
    let mut visible: Vec<FieldRef> = physical.fields().iter().map(Arc::clone).collect();
    let mut exprs = Vec::new();
    for column in create.columns.iter().filter(|c| Some(&c.name) != sign) {
        let Some(sql) = &column.computed else {
            let plain = Expr::Column(datafusion::common::Column::new_unqualified(&column.name));
            exprs.push(match column.length {
                Some(length) => at_most(plain, length).alias(&column.name),
                None => plain,
            });
            continue;
        };
        let scope = unqualified(&visible)?;
        let expr = sql_expr(&context, sql.clone(), &scope)?;
        let expr = match &column.data_type {
            Some(data_type) => Expr::Cast(Cast::new(Box::new(expr), data_type.clone())),
            None => expr,
        };
        let expr = match column.length {
            Some(length) => at_most(expr, length),
            None => expr,
        };
        let data_type = expr.get_type(&scope).map_err(located)?;
        let expr = expr
            .transform_up(|e| {
                Ok(match &e {
                    Expr::Column(c) => match computed.get(&c.name) {
                        Some(inner) => Transformed::yes(inner.clone()),
                        None => Transformed::no(e),
                    },
                    _ => Transformed::no(e),
                })
            })
            .data()
            .map_err(located)?;
        visible.push(Arc::new(Field::new(&column.name, data_type, true)));
        computed.insert(column.name.clone(), expr.clone());
        exprs.push(expr.alias(&column.name));
    }
    let plan = project(physical, exprs)?;
    physical_exprs(&plan, physical)
}

fn sql_expr(context: &Context<'_>, mut sql: ast::Expr, scope: &DFSchema) -> Result<Expr> {
    rewrite(&mut sql)?;
    planner(context)
        .sql_to_expr(sql, scope, &mut PlannerContext::new())
        .map_err(located)
}

fn unqualified(fields: &[FieldRef]) -> Result<DFSchema> {
    let schema = Schema::new(fields.to_vec());
    DFSchema::try_from(schema).map_err(located)
}

/// A plan that computes the expressions over a relation of these columns.
fn project(schema: &SchemaRef, exprs: Vec<Expr>) -> Result<LogicalPlan> {
    let source = CatalogSource {
        scanned: Scanned::Engine(EngineRelation {
            id: RelationId(0),
            name: String::new(),
            schema: Arc::clone(schema),
            event_time: vec![None; schema.fields().len()],
            append_only: true,
            source: None,
        }),
    };
    let plan = LogicalPlanBuilder::scan(TableReference::bare("source"), Arc::new(source), None)
        .and_then(|b| b.project(exprs))
        .and_then(LogicalPlanBuilder::build)
        .and_then(crate::optimize::analyze)
        .map_err(located)?;
    refuse_unmaintainable(&plan)?;
    super::shape(plan)
}

/// The expressions of an optimized projection over a scan.
fn physical_exprs(plan: &LogicalPlan, input: &SchemaRef) -> Result<Columns> {
    let schema = Schema::new(
        plan.schema()
            .fields()
            .iter()
            .map(|f| Arc::new(Field::new(f.name(), f.data_type().clone(), true)))
            .collect::<Vec<FieldRef>>(),
    );
    let optimized = optimize_view(plan.clone()).map_err(located)?;
    let scope = DFSchema::try_from_qualified_schema("source", input).map_err(located)?;
    let exprs: Vec<Expr> = match &optimized {
        LogicalPlan::Projection(p) if matches!(*p.input, LogicalPlan::TableScan(_)) => {
            p.expr.clone()
        }
        LogicalPlan::TableScan(scan) => scan
            .projected_schema
            .columns()
            .into_iter()
            .map(Expr::Column)
            .collect(),
        _ => {
            return Err(Error::unsupported(
                "a computed column is an expression over the columns of its row",
            ));
        }
    };
    let deciding = (0..exprs.len())
        .filter(|i| fallible(&exprs[*i], &scope))
        .collect();
    let exprs = exprs
        .iter()
        .map(|e| physical_expr(e, &scope))
        .collect::<Result<_>>()?;
    Ok(Columns {
        exprs,
        schema: Arc::new(schema),
        deciding,
    })
}

fn watermark(
    def: &WatermarkDef,
    schema: &SchemaRef,
    any_event_time: bool,
) -> Result<WatermarkPlan> {
    let Some((column, field)) = schema.column_with_name(&def.column) else {
        let error = Error::invalid(format!("column \"{}\" does not exist", def.column))
            .code(UNDEFINED_COLUMN);
        let names = schema.fields().iter().map(|f| f.name().as_str());
        return Err(match nearest(&def.column, names) {
            Some(near) => error.hint(format!("did you mean \"{near}\"?")),
            None => error,
        });
    };
    if *field.data_type() != timestamp() {
        return Err(Error::invalid(format!(
            "the watermark column \"{}\" is of type {}, not TIMESTAMP",
            def.column,
            sql_name(field.data_type())
        ))
        .code(TYPE_MISMATCH)
        .hint("compute a timestamp, as in at TIMESTAMP AS to_timestamp_millis(column)"));
    }
    let picture = CatalogPicture::default();
    let lake = BTreeMap::new();
    let context = Context::new(&picture, &lake);
    let fields: Vec<FieldRef> = schema.fields().iter().map(Arc::clone).collect();
    let scope = unqualified(&fields)?;
    let expr = sql_expr(&context, def.expr.clone(), &scope)?;
    let plan = project(schema, vec![expr.alias("watermark")])?;
    let data_type = plan.schema().field(0).data_type().clone();
    if data_type != timestamp() {
        return Err(Error::invalid(format!(
            "a watermark is a TIMESTAMP, this expression is of type {}",
            sql_name(&data_type)
        ))
        .code(TYPE_MISMATCH)
        .hint(format!("write it as {0} - INTERVAL '4' SECOND", def.column)));
    }
    // Over all columns of the relation, whatever the expression reads.
    let optimized = optimize_view(plan).map_err(located)?;
    let scope = DFSchema::try_from_qualified_schema("source", schema).map_err(located)?;
    let expr = match &optimized {
        LogicalPlan::Projection(p) => p.expr.first().cloned(),
        LogicalPlan::TableScan(scan) => scan
            .projected_schema
            .columns()
            .into_iter()
            .next()
            .map(Expr::Column),
        _ => None,
    };
    let expr = expr.ok_or_else(|| {
        Error::unsupported("a watermark is an expression over the columns of a row")
    })?;
    Ok(WatermarkPlan {
        column,
        expr: physical_expr(&expr, &scope)?,
        max_ahead_us: (!any_event_time).then_some(MAX_AHEAD_US),
    })
}

/// A physical expression whose arithmetic fails instead of wrapping.
pub(crate) fn physical_expr(expr: &Expr, schema: &DFSchema) -> Result<Arc<dyn PhysicalExpr>> {
    create_physical_expr(expr, schema, &ExecutionProps::new())
        .and_then(|e| {
            e.transform_up(|e| {
                let checked = e
                    .as_any()
                    .downcast_ref::<ScalarFunctionExpr>()
                    .and_then(|f| Some((as_checked(f.fun())?, f.args())));
                Ok(match checked {
                    Some((op, [left, right])) => Transformed::yes(Arc::new(
                        BinaryExpr::new(Arc::clone(left), op, Arc::clone(right))
                            .with_fail_on_overflow(true),
                    )
                        as Arc<dyn PhysicalExpr>),
                    _ => Transformed::no(e),
                })
            })
            .data()
        })
        .map_err(|e| planning(e).0)
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::purify::Purified;
    use crate::testing::schema;
    use crate::{Bound, bind};

    fn source(sql: &str, facts: &Discovered) -> SourceDef {
        let purified = Purified {
            source: Some(facts.clone()),
            ..Purified::from(parse_one(sql).expect("parses"))
        };
        match bind(purified, &CatalogPicture::default(), &[]).expect("binds") {
            Bound::CreateSource(def) => def,
            other => panic!("a source, not {other:?}"),
        }
    }

    #[test]
    fn what_was_discovered_is_written_into_the_stored_text() {
        let facts = Discovered {
            schema: Some(schema(&[
                ("Auction", DataType::Int64),
                ("price", DataType::Decimal128(18, 2)),
                ("date_time", timestamp()),
                ("op", DataType::Utf8),
            ])),
            event_time: Some(("date_time".into(), 4_000_000)),
            append_only: true,
            bounded: false,
            any_event_time: true,
        };
        let first = source(
            "CREATE SOURCE IF NOT EXISTS b (cents AS price * 100) WITH (connector = 'generator', kind = 'it''s', changelog = 'op')",
            &facts,
        );
        assert_eq!(first.event_time, [None, None, Some(1), None]);
        assert_eq!(first.physical.fields().len(), 3);
        assert_eq!(
            first.plan.watermark.as_ref().and_then(|w| w.max_ahead_us),
            None
        );
        // The text stands on its own: nothing has to be discovered again.
        let again = source(
            &first.text,
            &Discovered {
                append_only: true,
                ..Discovered::default()
            },
        );
        assert_eq!(again.text, first.text);
        assert_eq!(again.plan.schema, first.plan.schema);
        assert_eq!(again.event_time, first.event_time);
        assert_eq!(again.options, first.options);
        assert_eq!(again.if_not_exists, first.if_not_exists);
        let shown = |def: &SourceDef| {
            let watermark = def
                .plan
                .watermark
                .as_ref()
                .expect("a watermark")
                .expr
                .to_string();
            (format!("{:?}", def.plan.columns), watermark)
        };
        assert_eq!(shown(&again), shown(&first));
    }

    #[test]
    fn computed_columns_see_earlier_ones_and_fail_on_overflow() {
        use arrow::array::{Int64Array, RecordBatch};
        let def = source(
            "CREATE SOURCE s (a BIGINT, b AS a + 1, c AS b * 2) WITH (connector = 'files')",
            &Discovered::default(),
        );
        let batch = |a: i64| {
            RecordBatch::try_new(
                Arc::clone(&def.physical),
                vec![Arc::new(Int64Array::from(vec![a]))],
            )
            .expect("a row")
        };
        let value = |a| {
            def.plan.columns[2]
                .evaluate(&batch(a))
                .and_then(|v| v.into_array(1))
        };
        assert_eq!(*value(20).expect("a value"), Int64Array::from(vec![42]));
        assert!(value(i64::MAX).is_err());
    }
}
