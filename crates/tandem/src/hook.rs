//! The notify hook: a program of the operator's, run at every change of an endpoint's state.
//!
//! `HOOK INSTANCE endpoint STATE TERM`, keepalived's argument order (`TYPE NAME STATE PRIORITY`), so that its
//! scripts carry over where they need no privilege: the program runs with what the daemon kept for its children, which is
//! nothing. Runs one after the other, in the order of the changes, each bounded in time, and never
//! delays the control loop.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::sync::mpsc;
use tracing::{info, warn};

/// A hook that runs longer is ended.
const LIMIT: Duration = Duration::from_secs(30);
/// Changes that wait for an earlier run; more are dropped with a warning.
const WAITING: usize = 64;

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Name of the endpoint.
    pub endpoint: String,
    /// `MASTER`, `BACKUP` or `FAULT`, keepalived's words.
    pub state: &'static str,
    /// The endpoint's term.
    pub term: u64,
}

/// Where the control loop leaves changes.
#[derive(Debug, Clone)]
pub struct Hook {
    queue: Option<mpsc::Sender<Change>>,
}

impl Hook {
    /// Starts the runner on the current tokio runtime. `None` runs nothing.
    pub fn start(program: Option<PathBuf>, instance: String) -> Self {
        let Some(program) = program else { return Self { queue: None } };
        let (queue, mut changes) = mpsc::channel::<Change>(WAITING);
        tokio::spawn(async move {
            while let Some(change) = changes.recv().await {
                run(&program, &instance, &change).await;
            }
        });
        Self { queue: Some(queue) }
    }

    /// Queues one run.
    pub fn notify(&self, change: Change) {
        if let Some(queue) = &self.queue
            && queue.try_send(change).is_err()
        {
            warn!("notify hook: earlier runs are too slow, a change was not reported");
        }
    }
}

async fn run(program: &PathBuf, instance: &str, change: &Change) {
    let child = Command::new(program)
        .args([instance, &change.endpoint, change.state, &change.term.to_string()])
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(error) => {
            warn!(program = %program.display(), %error, "notify hook could not be started");
            return;
        }
    };
    match tokio::time::timeout(LIMIT, child.wait()).await {
        Ok(Ok(status)) if status.success() => {
            info!(endpoint = change.endpoint, state = change.state, "notify hook ran");
        }
        Ok(Ok(status)) => warn!(program = %program.display(), %status, "notify hook failed"),
        Ok(Err(error)) => warn!(program = %program.display(), %error, "notify hook was lost"),
        Err(_) => {
            warn!(program = %program.display(), limit_s = LIMIT.as_secs(), "notify hook took too long and was ended")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[tokio::test]
    async fn runs_in_order_with_keepalived_arguments() {
        let folder = std::env::temp_dir().join(format!("tandem-hook-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let script = folder.join("hook");
        let log = folder.join("log");
        std::fs::write(&script, format!("#!/bin/sh\necho \"$@\" >> {}\n", log.display())).unwrap();
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
        let hook = Hook::start(Some(script), "left".into());
        hook.notify(Change { endpoint: "main".into(), state: "MASTER", term: 16 });
        hook.notify(Change { endpoint: "main".into(), state: "BACKUP", term: 17 });
        let expected = "left main MASTER 16\nleft main BACKUP 17\n";
        let found = tokio::time::timeout(Duration::from_secs(10), async {
            loop {
                let text = std::fs::read_to_string(&log).unwrap_or_default();
                if text.len() >= expected.len() {
                    return text;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .unwrap();
        assert_eq!(found, expected);
        std::fs::remove_dir_all(folder).unwrap();
    }
}
