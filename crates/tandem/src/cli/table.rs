//! The status as a person reads it: who am I, do I hear the other one, who serves what, which tunnels stand.
//!
//! Every line answers a question that an operator asks in this order; what is not well is said in words and,
//! on a terminal, in colour. Nothing is shown that has nothing to say.

use comfy_table::{Attribute, Cell, CellAlignment, Color, ContentArrangement, Table, presets};
use gateway::status::{
    ChildState, ChildStatus, Contact, EndpointStatus, FlowStatus, Mode, Nat, PairStatus, Role,
    Status, TunnelCounts, TunnelState, TunnelStatus,
};

/// Draws the whole status; `colour` for a terminal.
#[must_use]
pub fn render(status: &Status, colour: bool) -> String {
    let mut blocks = vec![head(status, colour)];
    blocks.push(endpoints(&status.endpoints, colour));
    if status.tunnels.is_empty() {
        blocks.push(counts(&status.tunnel_counts));
    }
    blocks.push(tunnels(&status.tunnels, colour));
    blocks.push(children(&status.tunnels, colour));
    blocks.push(errors(&status.tunnels));
    blocks.push(drops(status));
    blocks.retain(|block| !block.is_empty());
    blocks.join("\n\n")
}

/// How well something is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mood {
    Good,
    Busy,
    Bad,
    Plain,
}

fn mood_colour(mood: Mood) -> Option<Color> {
    match mood {
        Mood::Good => Some(Color::Green),
        Mood::Busy => Some(Color::Yellow),
        Mood::Bad => Some(Color::Red),
        Mood::Plain => None,
    }
}

fn cell(text: impl Into<String>, mood: Mood) -> Cell {
    let cell = Cell::new(text.into());
    match mood_colour(mood) {
        Some(colour) => cell.fg(colour),
        None => cell,
    }
}

fn plain(text: impl Into<String>) -> Cell {
    cell(text, Mood::Plain)
}

fn number(text: impl Into<String>) -> Cell {
    plain(text).set_alignment(CellAlignment::Right)
}

fn table(colour: bool, header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    if colour {
        table.enforce_styling();
    } else {
        table.force_no_tty();
    }
    table.set_header(header.iter().map(|title| Cell::new(title).add_attribute(Attribute::Bold)));
    table
}

/// Without the spaces that the layout leaves at the ends of lines and before the first column.
fn drawn(table: &Table) -> String {
    let lines = table.lines().map(|line| {
        let line = line.trim_end();
        line.strip_prefix(' ').unwrap_or(line).to_owned()
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn head(status: &Status, colour: bool) -> String {
    let mut text = format!(
        "{} · tandemd {} · up {} · configuration {}",
        status.instance,
        status.release,
        span(status.uptime_s),
        status.config_digest
    );
    if status.workers > 1 {
        text += &format!(" · {} workers", status.workers);
    }
    if status.draining {
        text += &format!(" · {}", painted("draining", Mood::Busy, colour));
    }
    match &status.pair {
        None => text += "\na gateway on its own",
        Some(pair) => text += &format!("\n{}", pair_lines(pair, colour)),
    }
    text
}

fn pair_lines(pair: &PairStatus, colour: bool) -> String {
    let (word, mood) = match pair.contact {
        Contact::TwoWay => ("in contact", Mood::Good),
        Contact::OneWay => ("heard, but does not hear us", Mood::Bad),
        Contact::None => ("not heard", Mood::Bad),
        Contact::Refused => ("refused", Mood::Bad),
    };
    let mut text = format!("{}: {}", pair.peer, painted(word, mood, colour));
    if let Some(release) = &pair.peer_release {
        text += &format!(" · tandemd {release}");
    }
    if let Some(format) = pair.format {
        text += &format!(" · {}", format_line(format, pair));
    }
    if let Some(why) = &pair.refused {
        text += &format!("\n  {why}");
    }
    let mut links = table(colour, &["LINK", "", "ROUND TRIP", "HEARD"]);
    for link in &pair.links {
        let (word, mood) = match (link.up, link.stream) {
            (true, true) => ("up, stream", Mood::Good),
            (true, false) => ("up", Mood::Good),
            (false, _) => ("down", Mood::Bad),
        };
        links.add_row(vec![
            plain(format!("{} → {}", link.local, link.remote)),
            cell(word, mood),
            number(link.rtt_us.map_or("–".into(), micros)),
            number(link.last_heard_ms.map_or("never".into(), |ms| format!("{} ago", millis(ms)))),
        ]);
    }
    if !pair.links.is_empty() {
        text += &format!("\n\n{}", drawn(&links));
    }
    text
}

/// `format 1 (this instance speaks 1, the other 2)`, or without the rest where both speak no newer.
fn format_line(format: u32, pair: &PairStatus) -> String {
    let newer = |newest: Option<u32>| newest.is_some_and(|newest| newest > format);
    let mut text = format!("format {format}");
    if newer(pair.newest_format) || newer(pair.peer_newest_format) {
        let newest = |newest: Option<u32>| newest.map_or("?".into(), |n| n.to_string());
        let (here, there) = (newest(pair.newest_format), newest(pair.peer_newest_format));
        text += &format!(" (this instance speaks {here}, the other {there})");
    }
    text
}

fn painted(word: &str, mood: Mood, colour: bool) -> String {
    let code = match mood {
        Mood::Good => 32,
        Mood::Busy => 33,
        Mood::Bad => 31,
        Mood::Plain => return word.to_owned(),
    };
    if colour { format!("\x1b[{code}m{word}\x1b[0m") } else { word.to_owned() }
}

fn endpoints(endpoints: &[EndpointStatus], colour: bool) -> String {
    let header =
        ["ENDPOINT", "ADDRESS", "HOME", "OWNER", "HERE", "TERM", "STATE", "LOG", "FENCE", "UPLINK"];
    let mut table = table(colour, &header);
    for e in endpoints {
        let (role, role_mood) = match e.role {
            Role::Owner => ("owner", Mood::Good),
            Role::Shadow => ("shadow", Mood::Good),
            Role::Steering => ("steering", Mood::Busy),
            Role::None => ("none", Mood::Bad),
        };
        let (mode, mode_mood) = match (e.role, e.mode) {
            (Role::None, _) => ("–", Mood::Plain),
            (_, Mode::Solo) => ("solo", Mood::Busy),
            (_, Mode::Syncing) => ("syncing", Mood::Busy),
            (_, Mode::Synced) => ("synced", Mood::Good),
        };
        let (uplink, uplink_mood) = match e.uplink {
            Some(true) => ("up", Mood::Good),
            Some(false) => ("down", Mood::Bad),
            None => ("–", Mood::Plain),
        };
        let log = match e.acked_position {
            Some(acked) => format!("{acked}/{}", e.position),
            None => e.position.to_string(),
        };
        let owner = match (e.owner.as_deref(), e.home_in_s) {
            (None, _) => cell("nobody", Mood::Bad),
            (Some(owner), None) => plain(owner),
            (Some(owner), Some(left)) => plain(format!("{owner}, home in {}", span(left))),
        };
        table.add_row(vec![
            plain(&e.name),
            plain(&e.address),
            plain(&e.home),
            owner,
            cell(role, role_mood),
            number(e.term.to_string()),
            cell(mode, mode_mood),
            number(log),
            number(e.fence_ms_left.map_or("–".into(), millis)),
            cell(uplink, uplink_mood),
        ]);
    }
    if endpoints.is_empty() { String::new() } else { drawn(&table) }
}

/// The flows of `tandem flows`.
pub(super) fn flows(flows: &[FlowStatus], colour: bool) -> String {
    let mut table =
        table(colour, &["FROM", "TO", "PROTOCOL", "CONNECTION", "PINNED TO", "SPI OUT", "IDLE"]);
    for flow in flows {
        let end = |address: &str, port: Option<u16>| match (port, address.contains(':')) {
            (None, _) => address.to_owned(),
            (Some(port), false) => format!("{address}:{port}"),
            (Some(port), true) => format!("[{address}]:{port}"),
        };
        let protocol = match flow.protocol {
            1 => "icmp".to_owned(),
            6 => "tcp".to_owned(),
            17 => "udp".to_owned(),
            58 => "icmpv6".to_owned(),
            other => other.to_string(),
        };
        let place = match flow.steered {
            true => cell(format!("{}, steered", flow.endpoint), Mood::Busy),
            false => plain(&flow.endpoint),
        };
        table.add_row(vec![
            plain(end(&flow.source, flow.source_port)),
            plain(end(&flow.destination, flow.destination_port)),
            plain(protocol),
            plain(flow.connection.as_deref().unwrap_or("–")),
            place,
            plain(flow.spi_out.as_deref().unwrap_or("–")),
            number(millis(flow.idle_ms)),
        ]);
    }
    if flows.is_empty() {
        "no flow passed here within the last minute".to_owned()
    } else {
        drawn(&table)
    }
}

/// How far a tunnel is, in a word.
pub(super) fn state(state: TunnelState) -> &'static str {
    match state {
        TunnelState::Down => "down",
        TunnelState::Connecting => "connecting",
        TunnelState::Established => "established",
        TunnelState::Closing => "closing",
    }
}

/// The tunnels of a summary.
fn counts(counts: &TunnelCounts) -> String {
    let TunnelCounts { down, connecting, established, closing, children } = *counts;
    let kinds = [
        (established, state(TunnelState::Established)),
        (connecting, state(TunnelState::Connecting)),
        (closing, state(TunnelState::Closing)),
        (down, state(TunnelState::Down)),
    ];
    let words = kinds.into_iter().filter(|(n, _)| *n > 0).map(|(n, word)| format!("{n} {word}"));
    match words.collect::<Vec<_>>().join(", ") {
        none if none.is_empty() => none,
        some => format!("tunnels: {some} · Child SAs installed: {children}"),
    }
}

fn tunnels(tunnels: &[TunnelStatus], colour: bool) -> String {
    let header =
        ["TUNNEL", "AT", "STATE", "PEER", "PEER ADDRESS", "AGE", "REKEY IN", "NAT", "ALGORITHMS"];
    let mut table = table(colour, &header);
    for t in tunnels {
        let mood = match t.state {
            TunnelState::Established => Mood::Good,
            TunnelState::Connecting | TunnelState::Closing => Mood::Busy,
            TunnelState::Down => Mood::Bad,
        };
        let (word, mood) = match t.state {
            TunnelState::Down if t.taken_down => ("taken down", Mood::Plain),
            other => (state(other), mood),
        };
        let mut row = vec![plain(&t.connection), plain(&t.endpoint), cell(word, mood)];
        if let Some(ike) = &t.ike {
            let nat = match ike.nat {
                Nat::None => "–",
                Nat::Local => "here",
                Nat::Remote => "there",
                Nat::Both => "both",
            };
            row.push(plain(&ike.remote_id));
            row.push(plain(&ike.remote));
            row.push(number(span(ike.age_s)));
            row.push(number(ike.rekey_in_s.map_or("–".into(), span)));
            row.push(plain(nat));
            row.push(plain(&ike.algs));
        }
        table.add_row(row);
    }
    if tunnels.is_empty() { String::new() } else { drawn(&table) }
}

fn children(tunnels: &[TunnelStatus], colour: bool) -> String {
    let header = [
        "CHILD", "STATE", "OURS", "THEIRS", "SPI IN", "SPI OUT", "RECEIVED", "SENT", "AGE",
        "REKEY IN",
    ];
    let mut table = table(colour, &header);
    let all = tunnels.iter().flat_map(|t| t.children.iter().map(move |c| (t, c)));
    for (t, c) in all {
        let (word, mood) = child_state(c);
        let traffic = |packets: u64, amount: u64| format!("{} ({packets})", bytes(amount));
        table.add_row(vec![
            plain(format!("{}.{}", t.connection, c.name)),
            cell(word, mood),
            plain(c.local_ts.join(" ")),
            plain(c.remote_ts.join(" ")),
            plain(&c.spi_in),
            plain(&c.spi_out),
            number(traffic(c.packets_in, c.bytes_in)),
            number(traffic(c.packets_out, c.bytes_out)),
            number(span(c.age_s)),
            number(c.rekey_in_s.map_or("–".into(), span)),
        ]);
    }
    if table.is_empty() { String::new() } else { drawn(&table) }
}

fn child_state(child: &ChildStatus) -> (&'static str, Mood) {
    match child.state {
        ChildState::Installing => ("installing", Mood::Busy),
        ChildState::Installed => ("installed", Mood::Good),
        ChildState::Rekeying => ("rekeying", Mood::Good),
        ChildState::Rekeyed => ("rekeyed", Mood::Plain),
        ChildState::Closing => ("closing", Mood::Busy),
    }
}

fn errors(tunnels: &[TunnelStatus]) -> String {
    let line = |t: &TunnelStatus| {
        let error = t.last_error.as_ref()?;
        Some(format!(
            "{} at {}, {} ago: {}",
            t.connection,
            t.endpoint,
            span(error.age_s),
            error.text
        ))
    };
    tunnels.iter().filter_map(line).collect::<Vec<_>>().join("\n")
}

fn drops(status: &Status) -> String {
    let c = &status.counters;
    let lines = [("packets", &c.drops), ("IKE", &c.ike_drops), ("pair link", &c.pair_drops)];
    let line = |(what, map): &(&str, &std::collections::BTreeMap<String, u64>)| {
        let reasons = map.iter().filter(|(_, n)| **n > 0).map(|(why, n)| format!("{why} {n}"));
        let reasons = reasons.collect::<Vec<_>>().join(", ");
        (!reasons.is_empty()).then(|| format!("dropped, {what}: {reasons}"))
    };
    lines.iter().filter_map(line).collect::<Vec<_>>().join("\n")
}

/// `3h12m`: two units are enough.
fn span(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, m) => format!("{m}m{:02}s", seconds % 60),
        (0, h, m) => format!("{h}h{m:02}m"),
        (d, h, _) => format!("{d}d{h:02}h"),
    }
}

fn millis(ms: u64) -> String {
    if ms < 10_000 { format!("{ms} ms") } else { span(ms / 1000) }
}

fn micros(us: u64) -> String {
    format!("{}.{:02} ms", us / 1000, us % 1000 / 10)
}

/// `1.2 GB`: decimal units, as for links.
fn bytes(amount: u64) -> String {
    let mut whole = amount;
    let mut tenths = 0;
    for unit in ["B", "kB", "MB", "GB", "TB"] {
        if whole < 1000 {
            let fraction = if unit == "B" { String::new() } else { format!(".{tenths}") };
            return format!("{whole}{fraction} {unit}");
        }
        tenths = whole % 1000 / 100;
        whole /= 1000;
    }
    format!("{whole}.{tenths} PB")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_short() {
        assert_eq!(
            [span(0), span(59), span(61), span(11_520), span(90_000)],
            ["0s", "59s", "1m01s", "3h12m", "1d01h"]
        );
        assert_eq!(
            [bytes(999), bytes(1000), bytes(1_234_567), bytes(u64::MAX)],
            ["999 B", "1.0 kB", "1.2 MB", "18446.7 PB"]
        );
        assert_eq!([micros(312), micros(12_345)], ["0.31 ms", "12.34 ms"]);
    }
}
