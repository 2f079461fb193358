#!/usr/bin/env bash
# Makes tests/upgrade/<format>.tar.gz with the binary of this tree. To be run when a stored format has
# changed, after `FORMAT` in tests/tests/http/upgrade.rs has grown; the older files stay as they are.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
cargo build --workspace --all-targets
cargo test --workspace --test http -- --ignored --nocapture make_the_fixture_of_this_format
