//! The demo's page: one HTML file that needs nothing else. Received packets over time with the events marked,
//! a close look at every event, a table, and the cloud gateway's promise beside what was measured.

use std::fmt::Write as _;
use std::time::Duration;

/// What the cloud gateway promises for planned work, milliseconds (ha.md).
pub const CLOUD_PLANNED_MS: u32 = 10_000;
/// What it promises for failures, milliseconds.
pub const CLOUD_UNPLANNED_MS: u32 = 60_000;

/// One event of the demo.
#[derive(Clone, Debug)]
pub struct Event {
    /// `kill`, `rejoin`, `switchover`.
    pub kind: String,
    /// For people.
    pub title: String,
    /// What happened, in one sentence.
    pub story: String,
    /// Seconds since the plot's beginning.
    pub at_s: f64,
    /// The longest silence, milliseconds.
    pub gap_ms: f64,
    /// Lost packets.
    pub lost: u64,
    /// Sent packets.
    pub sent: u64,
    /// SPIs that changed at the peer.
    pub spis_changed: u64,
    /// IKE exchanges at the peer.
    pub ike_exchanges: u64,
    /// Whether every TCP connection survived.
    pub tcp_survived: bool,
    /// Flows that left their tunnel, where there are two.
    pub flows_moved: Option<u64>,
    /// What the cloud gateway promises for it, milliseconds.
    pub promise_ms: Option<u32>,
    /// Arrivals around the event in milliseconds relative to it: towards the peer, from the peer.
    pub close: [Vec<f64>; 2],
}

/// Everything on the page.
#[derive(Clone, Debug)]
pub struct Page {
    /// What was watched, in a few sentences.
    pub intro: String,
    /// Probe packets sent each way, a second.
    pub rate: u32,
    /// Width of a bucket of the series.
    pub bucket: Duration,
    /// Packets received per bucket: towards the peer, from the peer.
    pub packets: [Vec<u32>; 2],
    /// Bytes that the bulk TCP stream delivered per bucket.
    pub tcp: Vec<u64>,
    /// The events, in order.
    pub events: Vec<Event>,
    /// Protected datagrams looked at, and (key, IV) repeats among them.
    pub ivs: (u64, u64),
}

/// Half of a close look's width, milliseconds.
pub const CLOSE_MS: f64 = 150.0;

const WIDTH: f64 = 1000.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 16.0;

const STYLE: &str = "
:root{--bg:#fbfaf7;--card:#fff;--ink:#1d2430;--soft:#667085;--line:#e4e2dc;--a:#1f6feb;--b:#0f9d75;--c:#b7791f;--bad:#c2410c;--mark:#c2410c}
@media(prefers-color-scheme:dark){:root{--bg:#14171c;--card:#1c2027;--ink:#e9ecf1;--soft:#98a2b3;--line:#2e343e;--a:#6ea8fe;--b:#4cc9a0;--c:#e0b15c;--bad:#fb923c;--mark:#fb923c}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,'Segoe UI',sans-serif}
main{max-width:1080px;margin:0 auto;padding:40px 20px 80px}
h1{font-size:30px;line-height:1.2;margin:0 0 6px;letter-spacing:-.02em}h2{font-size:18px;margin:40px 0 10px}
p{margin:0 0 12px;max-width:72ch}.soft{color:var(--soft)}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:16px;margin:0 0 16px;overflow-x:auto}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:12px;margin:24px 0 8px}
.fact b{display:block;font-size:28px;letter-spacing:-.02em}.fact span{color:var(--soft);font-size:14px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:8px 10px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}th{color:var(--soft);font-weight:500;font-size:14px}
th:first-child,td:first-child{text-align:left}tr:last-child td{border-bottom:0}
svg{display:block;width:100%;height:auto;min-width:640px}svg text{fill:var(--soft);font:12px system-ui,sans-serif}
.grid{stroke:var(--line)}.mark{stroke:var(--mark);stroke-dasharray:4 3}.marktext{fill:var(--mark)!important;font-weight:600!important}
.a{stroke:var(--a)}.b{stroke:var(--b)}.c{stroke:var(--c)}.fa{fill:var(--a)}.fb{fill:var(--b)}.fc{fill:var(--c)}.fill{opacity:.16;stroke:none}
.good{color:var(--b)}.bad{color:var(--bad)}.close{display:grid;grid-template-columns:1fr;gap:12px}
";

/// Writes the page.
pub fn render(page: &Page) -> String {
    let mut html = String::new();
    let worst = page.events.iter().map(|event| event.gap_ms).fold(0.0, f64::max);
    let lost: u64 = page.events.iter().map(|event| event.lost).sum();
    let sent: u64 = page.events.iter().map(|event| event.sent).sum();
    let spis: u64 = page.events.iter().map(|event| event.spis_changed).fold(0, u64::saturating_add);
    let exchanges: u64 = page.events.iter().map(|event| event.ike_exchanges).sum();
    let _ = write!(
        html,
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
         <title>Tandem: a tunnel that survived</title><style>{STYLE}</style></head><body><main>\
         <h1>The tunnel outlived its gateway</h1>\
         <p class=\"soft\">{}</p>",
        escape(&page.intro)
    );
    let _ = write!(
        html,
        "<div class=\"facts\"><div class=\"card fact\"><b>{worst:.1} ms</b><span>longest silence of all events</span></div>\
         <div class=\"card fact\"><b>{lost} of {}</b><span>packets lost while it happened</span></div>\
         <div class=\"card fact\"><b>{spis}</b><span>SPIs changed at the peer, {exchanges} IKE exchanges</span></div>\
         <div class=\"card fact\"><b>{} in {}</b><span>nonce repeats in all protected datagrams captured</span></div></div>",
        thousands(sent),
        page.ivs.1,
        thousands(page.ivs.0)
    );
    html.push_str("<h2>Received packets over time</h2><div class=\"card\">");
    overview(&mut html, page);
    html.push_str("</div><h2>Each event, close up</h2><p class=\"soft\">Every tick is one packet at the moment it arrived.</p><div class=\"close\">");
    for event in &page.events {
        html.push_str("<div class=\"card\">");
        let _ = write!(html, "<p><b>{}</b>. {}</p>", escape(&event.title), escape(&event.story));
        close_up(&mut html, event);
        html.push_str("</div>");
    }
    html.push_str("</div><h2>Summary</h2><div class=\"card\">");
    table(&mut html, page);
    html.push_str("</div><h2>Beside the cloud's promise</h2><p class=\"soft\">The managed cloud gateway that Tandem is modelled on promises to be back within 10 s of planned work and within 60 s of a failure. The scale is logarithmic: every line is ten times the one before.</p><div class=\"card\">");
    promise(&mut html, page);
    html.push_str("</div></main></body></html>\n");
    html
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A plot's place: maps a value range onto a band of the drawing.
struct Band {
    top: f64,
    height: f64,
    most: f64,
}

impl Band {
    fn y(&self, value: f64) -> f64 {
        self.top + self.height * (1.0 - (value / self.most).min(1.0))
    }
}

fn overview(html: &mut String, page: &Page) {
    let bucket = page.bucket.as_secs_f64();
    let length = page.packets.iter().map(Vec::len).max().unwrap_or(0).max(1);
    let seconds = length as f64 * bucket;
    let x = |at: f64| LEFT + (WIDTH - LEFT - RIGHT) * (at / seconds).clamp(0.0, 1.0);
    let expected = f64::from(page.rate) * bucket;
    let _ = write!(
        html,
        "<svg viewBox=\"0 0 {WIDTH} 420\" role=\"img\" aria-label=\"received packets over time\">"
    );
    let mut second = 0.0;
    while second <= seconds {
        let at = x(second);
        let _ = write!(
            html,
            "<line class=\"grid\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"34\" y2=\"390\"/>\
             <text x=\"{at:.1}\" y=\"408\" text-anchor=\"middle\">{second:.0} s</text>"
        );
        second += 5.0;
    }
    let names = ["to the peer", "from the peer"];
    for (index, (series, class)) in page.packets.iter().zip(["a", "b"]).enumerate() {
        let band = Band { top: 44.0 + 120.0 * index as f64, height: 92.0, most: expected * 1.6 };
        let points: Vec<(f64, f64)> = series
            .iter()
            .enumerate()
            .map(|(at, count)| (x((at as f64 + 0.5) * bucket), band.y(f64::from(*count))))
            .collect();
        plot(html, &points, &band, class);
        let _ = write!(
            html,
            "<text x=\"{}\" y=\"{:.0}\" text-anchor=\"end\">{}/s</text><text x=\"{}\" y=\"{:.0}\" text-anchor=\"end\">0</text>\
             <text x=\"{}\" y=\"{:.0}\" class=\"f{class}\">UDP probes {}</text>",
            LEFT - 8.0,
            band.y(expected) + 4.0,
            thousands(page.rate.into()),
            LEFT - 8.0,
            band.y(0.0) + 4.0,
            LEFT + 6.0,
            band.top + 6.0,
            names.get(index).unwrap_or(&"")
        );
    }
    let most = page.tcp.iter().copied().max().unwrap_or(1).max(1) as f64;
    let band = Band { top: 284.0, height: 92.0, most };
    let points: Vec<(f64, f64)> = page
        .tcp
        .iter()
        .enumerate()
        .map(|(at, bytes)| (x((at as f64 + 0.5) * bucket), band.y(*bytes as f64)))
        .collect();
    plot(html, &points, &band, "c");
    let _ = write!(
        html,
        "<text x=\"{}\" y=\"290\" text-anchor=\"end\">{:.0} Mb/s</text><text x=\"{}\" y=\"290\" class=\"fc\">bulk TCP stream</text>",
        LEFT - 8.0,
        most * 8.0 / bucket / 1e6,
        LEFT + 6.0
    );
    for event in &page.events {
        let at = x(event.at_s);
        let _ = write!(
            html,
            "<line class=\"mark\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"24\" y2=\"390\"/>\
             <text class=\"marktext\" x=\"{at:.1}\" y=\"16\" text-anchor=\"middle\">{} · {:.1} ms</text>",
            escape(&event.kind),
            event.gap_ms
        );
    }
    html.push_str("</svg>");
}

fn plot(html: &mut String, points: &[(f64, f64)], band: &Band, class: &str) {
    let (Some(first), Some(last)) = (points.first(), points.last()) else { return };
    let mut line = String::new();
    for (x, y) in points {
        let _ = write!(line, "{x:.1},{y:.1} ");
    }
    let floor = band.y(0.0);
    let _ = write!(
        html,
        "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{floor:.1}\" y2=\"{floor:.1}\"/>\
         <polygon class=\"f{class} fill\" points=\"{:.1},{floor:.1} {line} {:.1},{floor:.1}\"/>\
         <polyline class=\"{class}\" fill=\"none\" stroke-width=\"1.2\" points=\"{line}\"/>",
        WIDTH - RIGHT,
        first.0,
        last.0
    );
}

fn close_up(html: &mut String, event: &Event) {
    let x = |ms: f64| {
        LEFT + (WIDTH - LEFT - RIGHT) * ((ms + CLOSE_MS) / (2.0 * CLOSE_MS)).clamp(0.0, 1.0)
    };
    let _ = write!(
        html,
        "<svg viewBox=\"0 0 {WIDTH} 118\" role=\"img\" aria-label=\"packets around the event\">"
    );
    let mut ms = -CLOSE_MS;
    while ms <= CLOSE_MS {
        let at = x(ms);
        let _ = write!(
            html,
            "<line class=\"grid\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"14\" y2=\"94\"/>\
             <text x=\"{at:.1}\" y=\"112\" text-anchor=\"middle\">{ms:+.0} ms</text>"
        );
        ms += 50.0;
    }
    for (index, (arrivals, class)) in event.close.iter().zip(["a", "b"]).enumerate() {
        let top = 20.0 + 38.0 * index as f64;
        let mut path = String::new();
        for at in arrivals.iter().filter(|at| at.abs() <= CLOSE_MS) {
            let _ = write!(path, "M{:.1} {top:.0}v30", x(*at));
        }
        let name = if index == 0 { "to peer" } else { "from peer" };
        let _ = write!(
            html,
            "<path class=\"{class}\" stroke-width=\"1.4\" d=\"{path}\"/>\
             <text x=\"{}\" y=\"{:.0}\" text-anchor=\"end\">{name}</text>",
            LEFT - 8.0,
            top + 19.0
        );
    }
    let at = x(0.0);
    let _ = write!(
        html,
        "<line class=\"mark\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"4\" y2=\"96\"/>\
         <text class=\"marktext\" x=\"{:.1}\" y=\"12\">{}</text></svg>",
        at + 6.0,
        escape(&event.kind)
    );
}

fn table(html: &mut String, page: &Page) {
    html.push_str(
        "<table><thead><tr><th>Event</th><th>Longest gap</th><th>Lost</th><th>Sent</th><th>SPIs changed</th>\
         <th>IKE exchanges</th><th>TCP connections</th>",
    );
    let moves = page.events.iter().any(|event| event.flows_moved.is_some());
    html.push_str(if moves { "<th>Flows moved</th>" } else { "" });
    html.push_str("</tr></thead><tbody>");
    for event in &page.events {
        let _ = write!(
            html,
            "<tr><td>{}</td><td>{:.1} ms</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td class=\"{}\">{}</td>",
            escape(&event.title),
            event.gap_ms,
            thousands(event.lost),
            thousands(event.sent),
            event.spis_changed,
            event.ike_exchanges,
            if event.tcp_survived { "good" } else { "bad" },
            if event.tcp_survived { "all survived" } else { "broken" }
        );
        if let Some(moved) = event.flows_moved {
            let _ = write!(html, "<td>{moved}</td>");
        }
        html.push_str("</tr>");
    }
    html.push_str("</tbody></table>");
}

fn promise(html: &mut String, page: &Page) {
    let mut rows: Vec<(String, f64, &str)> = page
        .events
        .iter()
        .map(|event| (event.title.clone(), event.gap_ms.max(0.1), "fb"))
        .collect();
    rows.push(("cloud, planned work".into(), f64::from(CLOUD_PLANNED_MS), "fc"));
    rows.push(("cloud, failure".into(), f64::from(CLOUD_UNPLANNED_MS), "fc"));
    let left = 230.0;
    let x = |ms: f64| left + (WIDTH - left - 90.0) * ((ms.log10() + 1.0) / 6.0).clamp(0.0, 1.0);
    let height = 34.0 * rows.len() as f64 + 40.0;
    let _ = write!(
        html,
        "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"gaps beside the cloud's promise\">"
    );
    for (power, label) in [
        (0.1, "0.1 ms"),
        (1.0, "1 ms"),
        (10.0, "10 ms"),
        (100.0, "100 ms"),
        (1e3, "1 s"),
        (1e4, "10 s"),
        (1e5, "100 s"),
    ] {
        let at = x(power);
        let _ = write!(
            html,
            "<line class=\"grid\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"4\" y2=\"{:.0}\"/>\
             <text x=\"{at:.1}\" y=\"{:.0}\" text-anchor=\"middle\">{label}</text>",
            height - 26.0,
            height - 8.0
        );
    }
    for (index, (name, ms, class)) in rows.iter().enumerate() {
        let top = 8.0 + 34.0 * index as f64;
        let text =
            if *ms >= 1000.0 { format!("{:.0} s", ms / 1000.0) } else { format!("{ms:.1} ms") };
        let _ = write!(
            html,
            "<text x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"end\">{}</text>\
             <rect class=\"{class}\" x=\"{left}\" y=\"{top:.0}\" width=\"{:.1}\" height=\"22\" rx=\"4\"/>\
             <text x=\"{:.1}\" y=\"{:.0}\">{text}</text>",
            left - 10.0,
            top + 15.0,
            escape(name),
            x(*ms) - left,
            x(*ms) + 8.0,
            top + 15.0
        );
    }
    html.push_str("</svg>");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_needs_nothing_else_and_escapes() {
        let page = Page {
            intro: "a <peer> & co".into(),
            rate: 2000,
            bucket: Duration::from_millis(20),
            packets: [vec![20; 500], vec![19; 500]],
            tcp: vec![50_000; 500],
            events: vec![Event {
                kind: "kill".into(),
                title: "kill -9".into(),
                story: "left died".into(),
                at_s: 5.0,
                gap_ms: 9.4,
                lost: 11,
                sent: 20_000,
                spis_changed: 0,
                ike_exchanges: 0,
                tcp_survived: true,
                flows_moved: Some(3),
                promise_ms: None,
                close: [vec![-1.0, 9.0], vec![-0.5]],
            }],
            ivs: (1_234_567, 0),
        };
        let html = render(&page);
        assert!(html.contains("a &lt;peer&gt; &amp; co") && !html.contains("<peer>"));
        assert!(html.contains("2,000/s") && html.contains("<td>3</td></tr>"));
        assert!(html.contains("0 in 1,234,567") && html.contains("11 of 20,000"));
        for outside in ["http:", "https:", "src=", "href=", "url(", "NaN", "inf"] {
            assert!(!html.contains(outside), "{outside}");
        }
        assert_eq!(html.matches("<svg").count(), html.matches("</svg>").count());
    }
}
