//! What the code under test logs: an ERROR fails the seed (style.md, 10); with `--seed`, everything from INFO on is
//! printed with the host and its time.

use std::cell::{Cell, RefCell};
use std::fmt::{self, Write as _};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata, Subscriber};

use crate::clock::Nanos;
use crate::scene::name_of;

thread_local! {
    static ERRORS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
    static AT: Cell<(Nanos, usize)> = const { Cell::new((0, usize::MAX)) };
    static VERBOSE: Cell<bool> = const { Cell::new(false) };
}

struct Collector;

struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let _ = match field.name() {
            "message" => write!(self.0, "{value:?} "),
            name => write!(self.0, "{name}={value:?} "),
        };
    }
}

fn wanted() -> Level {
    if VERBOSE.get() { Level::INFO } else { Level::ERROR }
}

impl Subscriber for Collector {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        if *metadata.level() <= Level::INFO { Interest::sometimes() } else { Interest::never() }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= wanted()
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line(String::new());
        event.record(&mut line);
        if VERBOSE.get() {
            say(&format!("{} {}", event.metadata().level(), line.0));
        }
        if *event.metadata().level() == Level::ERROR {
            ERRORS.with_borrow_mut(|errors| errors.push(line.0));
        }
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// Starts to listen; once per process is enough.
pub fn install() {
    // A second installation fails, and the first one serves.
    let _ = tracing::subscriber::set_global_default(Collector);
}

/// Whether this thread's simulations print.
pub fn set_verbose(on: bool) {
    VERBOSE.set(on);
}

/// Whether this thread's simulations print.
#[must_use]
pub fn verbose() -> bool {
    VERBOSE.get()
}

/// Whose turn it is now.
pub fn set_turn(now: Nanos, host: usize) {
    AT.set((now, host));
}

/// Prints one line with time and host, if this thread's simulations print.
pub fn say(text: &str) {
    if verbose() {
        let (now, host) = AT.get();
        let name = if host == usize::MAX { "·".to_owned() } else { name_of(host) };
        println!("{:>10.6} {name:<6} {text}", now as f64 / 1e9);
    }
}

/// The errors since the last call.
#[must_use]
pub fn take_errors() -> Vec<String> {
    ERRORS.with_borrow_mut(std::mem::take)
}
