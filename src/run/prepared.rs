//! A plan against the files it names: everything that can be known before a weight is read.

use candle_core::DType;
use serde::Serialize;

use super::continue_from::continued;
use super::directory::settings_of;
use super::inference::read_adapter;
use super::teacher::PreparedTeacher;
use super::told::Told;
use crate::adapter::{LoraConfig, Placements, hf, resolve};
use crate::data::{Batch, Dataset, Order, Preparation, Sampler, Text, eval_batches};
use crate::error::{Context, Error, Result};
use crate::model::Pretrained;
use crate::model::config::{InPeft, MoeConfig};
use crate::recipe::{AdapterPlan, Date, Evaluation, ExpertChoice, Length, Plan, RouterTraining, Trained};
use crate::train::Identity;

/// Keys of a model's configuration that tell who wrote it.
const NOT_OF_THE_MODEL: [&str; 3] = ["transformers_version", "_name_or_path", "architectures"];

/// A run that is ready to load its weights.
#[derive(Debug)]
pub struct Prepared {
    /// The model.
    pub base: Pretrained,
    /// What it is told about its text.
    pub(super) told: Told,
    /// Its tokenizer and chat template.
    pub text: Text,
    /// The rows to train and to evaluate on.
    pub dataset: Dataset,
    /// What is trained.
    pub trained: Trainee,
    /// What it is to be like.
    pub teacher: Option<PreparedTeacher>,
    /// The type that products are computed in.
    pub dtype: DType,
    /// Updates in all.
    pub steps: u64,
}

/// What is trained, resolved against the model.
#[derive(Debug)]
pub enum Trainee {
    /// An adapter.
    Adapter(Box<PlacedAdapter>),
    /// Every weight.
    Full,
}

/// An adapter and where it goes.
#[derive(Debug)]
pub struct PlacedAdapter {
    /// Rank, scale, targets, seeds.
    pub config: LoraConfig,
    /// The layers it goes to.
    pub placements: Placements,
    /// The adapter that training goes on with.
    pub from: Option<hf::Adapter>,
    /// Whether the weights of routers are trained too.
    pub routers: bool,
}

/// How many numbers are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Trainable {
    /// Numbers that training changes.
    pub trainable: u64,
    /// All numbers, the adapter's counted in.
    pub all: u64,
}

impl Prepared {
    /// Opens model, tokenizer and data of `plan` and resolves the targets; reads no weight.
    pub fn of(plan: &Plan) -> Result<Self> {
        let mut base = Pretrained::open(&plan.model.source)?;
        let name = base.name().to_string();
        plan.mixture.apply(base.config_mut(), &name, plan.seed, plan.trained == Trained::Full)?;
        base.check()?;
        base.check_companions()?;
        let trained = Trainee::of(plan, &base)?;
        let told = Told::by_recipe(&plan.data, &base)?;
        let text = told.text(&base)?;
        let dtype = plan.model.dtype.or(base.compute_dtype());
        let teacher = PreparedTeacher::of(plan, &base, text.tokenizer(), dtype)?;
        let (eval, eval_share, eval_least) = match &plan.data.eval {
            Evaluation::Files(files) => (files.as_slice(), 0.0, 0),
            Evaluation::Share(share) => ([].as_slice(), *share, 0),
            Evaluation::ShareOfMany => ([].as_slice(), Evaluation::HELD_OUT, Evaluation::MANY),
            Evaluation::Off => ([].as_slice(), 0.0, 0),
        };
        let preparation = Preparation {
            max_length: plan.data.max_length,
            train_on: plan.data.train_on,
            eval_share,
            eval_least,
            seed: plan.seed,
        };
        let most = base.config().max_position_embeddings;
        if plan.data.max_length > most {
            let asked = plan.data.max_length;
            return Err(Error::request(format!(
                "`data.max_length` is {asked}, and the model sees {most} tokens"
            ))
            .with_hint(match most {
                1 => "a model that sees one token learns nothing: look whether `max_position_embeddings` in its \
                      `config.json` is right"
                    .to_string(),
                _ => format!("set `data.max_length` to {most} or less"),
            }));
        }
        let dataset = Dataset::load(&plan.data.train, eval, &text, &preparation)?;
        let mut prepared = Self { base, told, text, dataset, trained, teacher, dtype, steps: 0 };
        prepared.steps = prepared.steps_of(plan);
        Ok(prepared)
    }

    /// An error that names a file of the model or its teacher which has changed since it was opened.
    pub(super) fn refuse_changed(&self) -> Result<()> {
        self.base.checkpoint().refuse_changed()?;
        self.teacher.iter().try_for_each(|teacher| teacher.base.checkpoint().refuse_changed())
    }

    /// The order of training.
    #[must_use]
    pub fn sampler(&self, plan: &Plan) -> Sampler<'_> {
        Sampler::new(
            &self.dataset.train,
            Order {
                seed: plan.seed,
                batch_size: plan.train.batch_size,
                pack: plan.data.pack,
                max_length: plan.data.max_length,
            },
        )
    }

    /// What the model is evaluated on.
    #[must_use]
    pub fn eval_batches(&self, plan: &Plan) -> Vec<Batch> {
        eval_batches(&self.dataset.eval, plan.eval_tokens())
    }

    /// What a resumed run must have in common with its beginning.
    pub fn identity(&self, plan: &Plan) -> Result<Identity> {
        let mut plan = Plan { output: "".into(), ..plan.clone() };
        // A date that a template uses shows in the data's digest, so that any date counts here as the same one.
        let says_nothing = plan.data.template.others.is_empty();
        plan.data.template.date = (!says_nothing).then_some(Date::FIXED);
        let mut config = self.base.config_json().as_object().cloned().unwrap_or_default();
        NOT_OF_THE_MODEL.iter().for_each(|key| drop(config.remove(*key)));
        let teacher = self.teacher.iter().map(|teacher| teacher.base.checkpoint().digest()).next();
        Ok(Identity {
            data: self.dataset.fingerprint(),
            weights: self.base.checkpoint().digest()?,
            teacher: teacher.transpose()?,
            dtype: Some(self.dtype.as_str().to_string()),
            config,
            settings: settings_of(&plan)?,
        })
    }

    /// How many numbers are trained, and how many there are.
    #[must_use]
    pub fn trainable(&self) -> Trainable {
        let model = self.base.config().num_parameters() as u64;
        match &self.trained {
            Trainee::Full => Trainable { trainable: model, all: model },
            Trainee::Adapter(adapter) => {
                let own = adapter.placements.num_parameters(adapter.config.lora_bias) as u64;
                let config = self.base.config();
                let of_router = |(_, moe): (usize, &MoeConfig)| (moe.experts * config.hidden_size) as u64;
                let routers = if adapter.routers { config.sparse_layers().map(of_router).sum() } else { 0 };
                Trainable { trainable: own + routers, all: model + own }
            }
        }
    }

    fn steps_of(&self, plan: &Plan) -> u64 {
        match plan.train.length {
            Length::Steps(steps) => steps,
            Length::Epochs(epochs) => {
                let mut sampler = self.sampler(plan);
                let whole = epochs.floor() as u64;
                let part = (epochs - epochs.floor()) * sampler.batches_in(whole) as f64;
                let batches = sampler.batches_before(whole) + part.round() as u64;
                batches.div_ceil(plan.train.accumulate as u64).max(1)
            }
        }
    }
}

impl Trainee {
    fn of(plan: &Plan, base: &Pretrained) -> Result<Self> {
        let Trained::Adapter(written) = &plan.trained else {
            refuse_quantized(base)?;
            refuse_unwritable(base)?;
            return Ok(Self::Full);
        };
        refuse_dense(written, base)?;
        refuse_unknown_experts(written, base)?;
        let router = plan.mixture.router;
        let (config, from) = match &**written {
            AdapterPlan::Fresh(fresh) => {
                let mut config = fresh.config.clone();
                if router == RouterTraining::Lora {
                    config.targets = config.targets.with_routers(base.config());
                }
                (config, None)
            }
            AdapterPlan::Continue(earlier) => {
                let adapter = read_adapter(&earlier.from)?.for_model(base.config())?;
                (continued(earlier, router, &adapter, base.config())?, Some(adapter))
            }
        };
        if config.rank == 0 {
            return Err(Error::request("`adapter.rank` is 0, so nothing would be trained")
                .with_hint("give a rank such as 16, or train all weights with `train.full = true`"));
        }
        let placements = match &from {
            Some(adapter) => adapter.fit(base).at(&adapter.source)?,
            None => resolve(&config, base.config())?,
        };
        let routers = router == RouterTraining::Full;
        Ok(Self::Adapter(Box::new(PlacedAdapter { config, placements, from, routers })))
    }
}

/// Which experts get an adapter is no question of a dense model.
fn refuse_dense(written: &AdapterPlan, base: &Pretrained) -> Result<()> {
    let (experts, shared_experts) = experts_of(written);
    let is_some = experts.is_some_and(|experts| *experts != ExpertChoice::All(true));
    let key = match (is_some, shared_experts) {
        _ if base.config().sparse_layers().next().is_some() => return Ok(()),
        (false, None | Some(true)) => return Ok(()),
        (false, Some(false)) => "adapter.shared_experts",
        (true, _) => "adapter.experts",
    };
    Err(Error::request(format!("`{key}` is for mixtures of experts, and `{}` is dense", base.name()))
        .with_hint("leave it out"))
}

/// A number that no expert has would leave out all experts it stands for, without a word.
fn refuse_unknown_experts(written: &AdapterPlan, base: &Pretrained) -> Result<()> {
    let (Some(ExpertChoice::Some(numbers)), _) = experts_of(written) else { return Ok(()) };
    let experts = base.config().sparse_layers().map(|(_, moe)| moe.experts).max().unwrap_or(0);
    let Some(unknown) = numbers.iter().find(|number| **number >= experts) else { return Ok(()) };
    Err(Error::request(format!(
        "`adapter.experts` has {unknown}, and `{}` has {experts} experts",
        base.name()
    ))
    .with_hint(format!("experts are numbered from 0 to {}", experts.saturating_sub(1))))
}

/// What a plan says of experts and of shared experts.
fn experts_of(written: &AdapterPlan) -> (Option<&ExpertChoice>, Option<bool>) {
    match written {
        AdapterPlan::Fresh(fresh) => (Some(&fresh.experts), Some(fresh.shared_experts)),
        AdapterPlan::Continue(earlier) => {
            (earlier.expected.experts.as_ref(), earlier.expected.shared_experts)
        }
    }
}

/// A trained model is written with a tensor per expert, which families with a layout of their own do not read.
fn refuse_unwritable(base: &Pretrained) -> Result<()> {
    let unknown = |moe: &MoeConfig| moe.names.in_peft == InPeft::Unknown;
    if !base.config().sparse_layers().any(|(_, moe)| unknown(moe)) {
        return Ok(());
    }
    Err(Error::request(format!(
        "`train.full` cannot write `{}`, whose experts are stored in one tensor",
        base.name()
    ))
    .with_hint("train an adapter and merge it"))
}

/// Training all weights needs weights that a small step can change.
fn refuse_quantized(base: &Pretrained) -> Result<()> {
    let Some(first) = base.quantized().next() else { return Ok(()) };
    let (count, stored) = (base.quantized().count(), base.stored_dtype(first)?);
    Err(Error::request(format!(
        "`train.full` trains all weights, and {count} of those in `{}` are quantized (`{first}` is {stored}): the steps of \
         training are smaller than the gaps between such values",
        base.name()
    ))
    .with_hint(
        "train an adapter, with a table `[adapter]` instead of `train.full`; or give the model in f32, bf16 or f16",
    ))
}
