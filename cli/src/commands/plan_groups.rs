//! `pswitch plan-groups`.

use std::time::Duration;

use anyhow::Context as _;
use pswitch_transfer::{Profile, compare, plan_within, predict};

use crate::args::{Format, PlanGroups};
use crate::exit::{Classify as _, Failure, print};

pub(crate) fn run(args: &PlanGroups) -> anyhow::Result<()> {
    let limit = Duration::from_secs(args.search_limit_s);
    let path = args.profile.display();
    let text = std::fs::read_to_string(&args.profile)
        .with_context(|| format!("cannot read {path}"))
        .class(Failure::Input)?;
    let profile: Profile =
        serde_yaml::from_str(&text).with_context(|| format!("{path} is no profile")).class(Failure::Input)?;
    let plan = plan_within(&profile, args.algorithm, limit)
        .with_context(|| format!("cannot plan {path}"))
        .class(Failure::Input)?;
    if args.format == Format::Json {
        return print(&format!("{}\n", serde_json::to_string_pretty(&plan)?));
    }
    let prediction = predict(&profile, &plan.cuts())?;
    let layers = profile.layers.len();
    print(&format!(
        "{}: {layers} layers in {} groups by `{}`\n\n{}\n\n{}\n\n\
         predicted {:.1} us, {:.2} % above the lower bound of {:.1} us; {}\n",
        plan.model,
        plan.groups.len(),
        plan.algorithm,
        prediction.table(),
        compare(&profile, limit)?.table(),
        plan.predicted_us,
        (plan.predicted_us / plan.lower_bound_us - 1.0) * 100.0,
        plan.lower_bound_us,
        prediction.bound()
    ))
}
