//! Many trials of one kind, one after another on one scene: what did not recover, and what the machine's own pauses
//! explain, is dealt with alike in both modes.

use crate::Args;
use lab::check::IvChecker;
use lab::clock;
use lab::error::write_file;
use lab::run::Run;
use lab::stall::StallWatch;
use lab::tandem::Daemon;
use std::time::Duration;

/// A scene, and how a trial is played on it.
pub(crate) trait Stage {
    type Scene;
    type Kind: Copy;
    type Outcome;

    /// `say` is told each step.
    fn build(&self, say: &mut dyn FnMut(&str)) -> lab::Result<Self::Scene>;
    /// Trial `number`, from 1.
    fn play(
        &self,
        scene: &mut Self::Scene,
        kind: Self::Kind,
        number: u32,
    ) -> lab::Result<Self::Outcome>;
    /// For people, in a line or two.
    fn tell(&self, scene: &Self::Scene, outcome: &Self::Outcome) -> String;
    /// Whether every bar was kept.
    fn judge(&self, scene: &Self::Scene, outcome: &Self::Outcome) -> lab::Result<()>;
    /// The longest pause of the machine, if such explain what was lost.
    fn stood_still(&self, outcome: &Self::Outcome, stalls: &StallWatch) -> Option<Duration>;
    /// Ends the trial: packets before it need not be kept.
    fn forget(&self, scene: &Self::Scene, outcome: &Self::Outcome);
    /// Feeds the IV checker with all that was captured.
    fn look(&self, scene: &mut Self::Scene) -> lab::Result<()>;

    fn key(&self, kind: Self::Kind) -> &'static str;
    fn ivs<'s>(&self, scene: &'s Self::Scene) -> &'s IvChecker;
    fn instances<'s>(&self, scene: &'s Self::Scene) -> &'s [Daemon; 2];
}

/// What a series of trials found.
pub(crate) struct Found<O> {
    pub(crate) outcomes: Vec<O>,
    /// Trials that did not recover.
    pub(crate) failed: u64,
    /// Trials not counted, and played again, because the machine stood still.
    pub(crate) stood_still: u64,
    pub(crate) packets_checked: u64,
    pub(crate) iv_repeats: u64,
}

/// What a scene's IV checker had counted at one moment.
struct IvCount(u64, u64);

impl IvCount {
    fn of(ivs: &IvChecker) -> IvCount {
        IvCount(ivs.checked, ivs.iv_repeats)
    }
}

/// Plays `args.trials` of one kind. The scene comes back: another one where a trial did not recover.
pub(crate) fn series<S: Stage>(
    args: &Args,
    run: &Run,
    stage: &S,
    mut scene: S::Scene,
    stalls: &StallWatch,
    kind: S::Kind,
) -> lab::Result<(S::Scene, Found<S::Outcome>)> {
    let mut found = Found {
        outcomes: Vec::new(),
        failed: 0,
        stood_still: 0,
        packets_checked: 0,
        iv_repeats: 0,
    };
    let mut seen = IvCount::of(stage.ivs(&scene));
    let mut number = 0;
    while number < args.trials {
        number += 1;
        let name = format!("{} {number}/{}", stage.key(kind), args.trials);
        let file = format!("{}-{number}", stage.key(kind));
        let logged = stage.instances(&scene).each_ref().map(|instance| instance.log().len());
        let outcome = match stage.play(&mut scene, kind, number) {
            Ok(outcome) => outcome,
            Err(error) => {
                found.failed += 1;
                eprintln!("  {name}: FAILED: {error}");
                keep_evidence(run, stage.instances(&scene), &file, logged)?;
                found.count(&seen, stage.ivs(&scene));
                drop(scene);
                run.clear_namespaces();
                scene = stage.build(&mut |_| {})?;
                seen = IvCount::of(stage.ivs(&scene));
                continue;
            }
        };
        eprintln!("  {name}: {}", stage.tell(&scene, &outcome));
        let kept = stage.judge(&scene, &outcome);
        stage.forget(&scene, &outcome);
        if let Err(problem) = kept {
            eprintln!("      FAILED: {problem}");
            keep_evidence(run, stage.instances(&scene), &file, logged)?;
            if let Some(pause) = stage.stood_still(&outcome, stalls)
                && found.stood_still < excused(args.trials)
            {
                eprintln!(
                    "      not counted, played again: the machine stood still for {:.0} ms",
                    clock::millis(pause)
                );
                found.stood_still += 1;
                number -= 1;
                continue;
            }
        }
        found.outcomes.push(outcome);
    }
    stage.look(&mut scene)?;
    found.count(&seen, stage.ivs(&scene));
    Ok((scene, found))
}

impl<O> Found<O> {
    fn count(&mut self, before: &IvCount, ivs: &IvChecker) {
        self.packets_checked += ivs.checked - before.0;
        self.iv_repeats += ivs.iv_repeats - before.1;
    }
}

/// How many trials of a kind may be played again because the machine stood still.
fn excused(trials: u32) -> u64 {
    u64::from(trials / 10).max(1)
}

/// What the daemons logged in a trial that kept not every bar: shown, and saved, since the next trial goes on with them.
fn keep_evidence(
    run: &Run,
    instances: &[Daemon; 2],
    name: &str,
    logged: [usize; 2],
) -> lab::Result<()> {
    run.keep_files();
    for (instance, skip) in instances.iter().zip(logged) {
        let log = instance.log();
        let new = log.get(skip..).unwrap_or_default();
        let path = run.dir().join(format!("{name}-{}.log", instance.name));
        write_file(&path, new)?;
        eprintln!("      {}, saved in {}:", instance.name, path.display());
        for line in new.lines().take(15) {
            eprintln!("        {line}");
        }
    }
    Ok(())
}
