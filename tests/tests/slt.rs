//! The SQL corpus (`tests/slt`), each query run several ways with equal answers: the first form of
//! "incremental equals batch".

use millrace_tests::kafka::broker;
use millrace_tests::rng::Rng;
use millrace_tests::slt::{corpus, run};

#[test]
fn the_corpus_is_large_enough() {
    if std::env::var("MILLRACE_SLT").is_ok() {
        return;
    }
    let files = corpus::load();
    let views = files
        .iter()
        .flat_map(|file| file.views.iter().map(move |view| (file, view)));
    let reads = |file: &corpus::File, query: &str| {
        file.tables
            .iter()
            .any(|table| table.changelog && query.contains(&table.name))
    };
    let retracting = views
        .clone()
        .filter(|(file, view)| reads(file, &view.query))
        .count();
    assert!(views.clone().count() >= 60, "{} queries", views.count());
    assert!(files.len() >= 12, "{} features", files.len());
    assert!(retracting >= 10, "{retracting} queries with retractions");
}

#[test]
fn batch() {
    run::batch(&corpus::load());
}

fn stream(workers: usize, restart: bool) {
    stream_by(1, workers, restart);
}

fn stream_by(processes: usize, workers: usize, restart: bool) {
    if let Some(broker) = broker() {
        let rng = Rng::from_env("slt");
        run::stream(&corpus::load(), &broker, processes, workers, restart, &rng);
    }
}

#[test]
fn stream_two_processes() {
    stream_by(2, 1, false);
}

#[test]
fn restart_two_processes() {
    stream_by(2, 2, true);
}

#[test]
fn stream_one_worker() {
    stream(1, false);
}

#[test]
fn stream_two_workers() {
    stream(2, false);
}

#[test]
fn restart_one_worker() {
    stream(1, true);
}

#[test]
fn restart_two_workers() {
    stream(2, true);
}
