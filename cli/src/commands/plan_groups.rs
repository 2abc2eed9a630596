//! `pswitch plan-groups`.

mod timeline;

use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use pswitch_plot::PlotFile;
use pswitch_transfer::{
    Algorithm, Plan, Prediction, Profile, ResidentPrefix, Table, TransferError, compare, plan_within,
    predict, ready_us, smallest_resident_prefix,
};
use serde::Serialize;

use self::timeline::Timeline;
use super::measure::measure;
use super::profile::summary;
use super::text::{above, count, megabytes, microseconds, printable};
use crate::args::{Format, PlanGroups};
use crate::exit::{Classify as _, Failure, print};

/// A profile of a million layers fits.
const MOST_BYTES_OF_A_PROFILE: u64 = 128 << 20;

pub(crate) fn run(args: &PlanGroups) -> anyhow::Result<()> {
    let (profile, path) = match (&args.profile, &args.model) {
        (Some(path), _) => (read(path).class(Failure::Input)?, path.display()),
        (None, Some(model)) => {
            let measured = measure(model, &args.device)?;
            eprint!("{}", summary(&measured));
            (measured.profile, model.display())
        }
        // The flags are declared so that one of them is there.
        (None, None) => bail!("neither a model nor a profile was given"),
    };
    let limit = Duration::from_secs(args.search_limit_s);
    let cannot_plan = || format!("cannot plan {path}");
    let plan = match plan_within(&profile, args.algorithm, limit) {
        // A search that takes too long does not make the profile invalid.
        Err(cut_off @ TransferError::CutOff { .. }) => return Err(cut_off).with_context(cannot_plan),
        planned => planned.with_context(cannot_plan).class(Failure::Input)?,
    };
    let findings = Findings::new(&profile, plan, args.tolerance)?;
    // The search for the comparison may take long: what is wrong with a plot shows before.
    findings.plot(&args.plot)?;
    match args.format {
        Format::Json => print(&format!("{}\n", serde_json::to_string_pretty(&findings.json())?)),
        Format::Table => {
            let layers = profile.layers.len();
            print(&findings.text(layers, &compare(&profile, limit)?.table()))
        }
    }
}

fn read(path: &Path) -> anyhow::Result<Profile> {
    let shown = path.display();
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MOST_BYTES_OF_A_PROFILE + 1).read_to_end(&mut bytes))
        .with_context(|| format!("cannot read {shown}"))?;
    if bytes.len() as u64 > MOST_BYTES_OF_A_PROFILE {
        bail!("{shown} is no profile: it has more than {} MiB", MOST_BYTES_OF_A_PROFILE >> 20);
    }
    serde_yaml::from_slice(&bytes).with_context(|| format!("{shown} is no profile"))
}

/// A plan and all that is said about it.
struct Findings {
    plan: Plan,
    prediction: Prediction,
    optimal_us: f64,
    ready_us: f64,
    prefix: ResidentPrefix,
    model_bytes: u64,
    tolerance_percent: f64,
}

/// What is printed for programs.
#[derive(Serialize)]
struct Json<'a> {
    #[serde(flatten)]
    plan: &'a Plan,
    ready_us: f64,
    resident_prefix_bytes: u64,
    resident_prefix_us: f64,
}

impl Findings {
    fn new(profile: &Profile, plan: Plan, tolerance_percent: f64) -> anyhow::Result<Self> {
        Ok(Self {
            prediction: predict(profile, &plan.cuts())?,
            optimal_us: match plan.algorithm {
                Algorithm::Optimal => plan.predicted_us,
                _ => pswitch_transfer::plan(profile, Algorithm::Optimal)?.predicted_us,
            },
            ready_us: ready_us(profile)?,
            prefix: smallest_resident_prefix(profile, tolerance_percent / 100.0)?,
            model_bytes: profile.layers.iter().map(|layer| layer.bytes).sum(),
            plan,
            tolerance_percent,
        })
    }

    fn json(&self) -> Json<'_> {
        Json {
            plan: &self.plan,
            ready_us: self.ready_us,
            resident_prefix_bytes: self.prefix.bytes,
            resident_prefix_us: self.prefix.predicted_us,
        }
    }

    fn text(&self, layers: usize, comparison: &Table) -> String {
        let Plan { model, algorithm, groups, predicted_us, lower_bound_us, .. } = &self.plan;
        format!(
            "{}: {} in {} by `{algorithm}`\n\n{}\n\n{comparison}\n\n\
             predicted {}: {}the lower bound of {}, {}the ready model's {}\n{}\n{}\n",
            printable(model),
            count(layers, "layer"),
            count(groups.len(), "group"),
            self.prediction.table(),
            microseconds(*predicted_us),
            above(*predicted_us, *lower_bound_us),
            microseconds(*lower_bound_us),
            above(*predicted_us, self.ready_us),
            microseconds(self.ready_us),
            self.prediction,
            self.residency()
        )
    }

    /// What a resident prefix would do, in a sentence.
    fn residency(&self) -> String {
        let Self { ready_us, prefix, model_bytes, tolerance_percent, .. } = self;
        let ready = format!("within {tolerance_percent} % of {}", microseconds(*ready_us));
        let switch = microseconds(prefix.predicted_us);
        let size = megabytes(prefix.bytes);
        if prefix.bytes == 0 {
            return format!(
                "keep nothing resident: the best plan is as fast as the ready model, {switch} and {ready}"
            );
        }
        let percent = prefix.bytes as f64 / *model_bytes as f64 * 100.0;
        let layers = count(prefix.layers, "layer");
        format!(
            "keep {size} ({percent:.1} %, {layers}) resident and the switch is as fast as the ready model: \
             {switch}, {ready}"
        )
    }

    fn plot(&self, files: &[PlotFile]) -> anyhow::Result<()> {
        let Plan { predicted_us, lower_bound_us, .. } = self.plan;
        let remark = format!(
            "{}; {}the lower bound; as fast as the ready model with {} resident",
            self.prediction.bound(),
            above(predicted_us, lower_bound_us),
            if self.prefix.bytes == 0 { "nothing".to_owned() } else { megabytes(self.prefix.bytes) }
        );
        let timeline = Timeline {
            plan: &self.plan,
            prediction: &self.prediction,
            optimal_us: self.optimal_us,
            ready_us: self.ready_us,
            remark: &remark,
        };
        Ok(files.iter().try_for_each(|file| file.write(&timeline))?)
    }
}
