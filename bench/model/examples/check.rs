//! Runs every configuration and every removal, and prints what was found.
//!
//! `cargo run -p ebb-model --example check [-- --paths]`; `--paths` prints each counterexample.

use std::process::ExitCode;

use ebb_model::rules::Rules;
use ebb_model::suite::{Config, REMOVALS};

fn main() -> ExitCode {
    let paths = std::env::args().any(|a| a == "--paths");
    let mut good = true;
    println!(
        "{:<10} {:>9} {:>10} {:>5} {:>7}  result",
        "all rules", "states", "total", "depth", "s"
    );
    for config in Config::ALL {
        let o = config.bounded().run(Rules::ALL, false);
        let name = format!("{config:?}");
        let took = o.took.as_secs_f32();
        print!("{name:<10} {:>9} {:>10} {:>5} {took:>7.2}  ", o.unique, o.total, o.depth);
        match (o.violated.first(), o.unreached.is_empty()) {
            (None, true) => println!("holds, nothing vacuous"),
            (None, false) => println!("holds, but never: {:?}", o.unreached),
            (Some((property, path)), _) => println!("BROKEN: {property}: {path:?}"),
        }
        good &= o.violated.is_empty() && o.unreached.is_empty();
    }
    println!("\n{:<40} {:<10} {:>9} {:>5}  caught by", "without", "in", "states", "steps");
    for removal in REMOVALS {
        let o = removal.config.bounded().run(Rules::ALL.without(removal.rules), true);
        let without =
            removal.rules.iter().map(|r| format!("{r:?}")).collect::<Vec<_>>().join(" + ");
        let name = format!("{:?}", removal.config);
        match o.violated.first() {
            Some((property, path)) => {
                println!("{without:<40} {name:<10} {:>9} {:>5}  {property}", o.unique, path.len());
                if paths {
                    println!("    {}", path.join(" → "));
                }
            }
            None => {
                good = false;
                println!("{without:<40} {name:<10} {:>9}     -  NOT CAUGHT", o.unique);
            }
        }
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
