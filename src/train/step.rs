//! One optimizer step's worth of gradients: forward and backward over its batches, weighted by supervised tokens.

use crate::data::Batch;
use crate::error::Result;
use crate::model::{Decoder, Recompute, RouterLosses, Tally, Terms};
use crate::ops::{Documents, Gradients, Pass, Trainables, cross_entropy, distillation, rows};

/// What is learned beside the labels.
#[derive(Debug, Clone, Copy, Default)]
pub struct Objective<'a> {
    /// Losses on routers.
    pub losses: RouterLosses,
    /// The model that the trained one is to be like.
    pub teacher: Option<Teacher<'a>>,
}

/// A model of the same vocabulary, which sees the same tokens and is not trained.
#[derive(Debug, Clone, Copy)]
pub struct Teacher<'a> {
    /// Its weights, computing in the type of the trained model.
    pub model: &'a Decoder,
    /// How much it counts.
    pub terms: distillation::Terms,
}

/// The gradients of the mean loss over all supervised tokens of a step.
#[derive(Debug)]
pub struct StepGradients {
    /// Mean natural-log loss per supervised token.
    pub loss: f64,
    /// The norm of all gradients together.
    pub norm: f64,
    /// By name.
    pub gradients: Gradients,
    /// The mean divergence from the teacher per supervised token, where it counts; `loss` leaves it out.
    pub kl: Option<f64>,
    /// The same of the distance of hidden states.
    pub hidden: Option<f64>,
    /// The losses on routers, which `loss` leaves out.
    pub router: Terms,
    /// How routers spread the tokens.
    pub tally: Tally,
}

/// Runs forward and backward over `batches`, each by itself. The mean is over the supervised tokens of all of them, so
/// that the way a step is cut does not change what it learns.
pub fn step_gradients(
    model: &Decoder,
    trainables: &Trainables,
    batches: &[Batch],
    dropout_step: Option<u64>,
    recompute: Recompute,
) -> Result<StepGradients> {
    balanced_step_gradients(model, trainables, batches, dropout_step, recompute, &RouterLosses::default())
}

/// As [`step_gradients`], with losses on routers beside the mean. These are taken over the tokens that are computed at once,
/// and summed by their number.
pub fn balanced_step_gradients(
    model: &Decoder,
    trainables: &Trainables,
    batches: &[Batch],
    dropout_step: Option<u64>,
    recompute: Recompute,
    losses: &RouterLosses,
) -> Result<StepGradients> {
    let objective = Objective { losses: *losses, teacher: None };
    objective_gradients(model, trainables, batches, dropout_step, recompute, &objective)
}

/// As [`step_gradients`], of everything that `objective` names: the teacher's terms are means over the supervised tokens too.
pub fn objective_gradients(
    model: &Decoder,
    trainables: &Trainables,
    batches: &[Batch],
    dropout_step: Option<u64>,
    recompute: Recompute,
    objective: &Objective<'_>,
) -> Result<StepGradients> {
    // On a thread of the pool, where nothing has to be handed over to it: a step is thousands of small products.
    rayon::scope(|_| {
        let learned = batches.iter().filter(|batch| batch.num_supervised() > 0);
        let tokens: usize = learned.map(|batch| batch.tokens.len()).sum();
        let (mut router, mut tally) = (Terms::default(), Tally::default());
        let supervised: usize = batches.iter().map(Batch::num_supervised).sum();
        let scale = 1.0 / supervised.max(1) as f64;
        let mut gradients = Gradients::of(trainables);
        let mut sums = Sums::default();
        for batch in batches {
            let share = batch.tokens.len() as f64 / tokens.max(1) as f64;
            let piece = Piece { batch, scale, share, dropout_step, recompute, objective };
            let (of_piece, terms) = piece.accumulate(model, &mut gradients, &mut tally)?;
            sums.add(&of_piece);
            router.total += share * terms.total;
            for (name, value) in terms.values {
                *router.values.entry(name).or_default() += share * value;
            }
        }
        let norm = gradients.norm()?;
        let terms = objective.teacher.map(|teacher| teacher.terms);
        let kl = terms.filter(|terms| terms.kl > 0.0).map(|_| sums.kl * scale);
        let hidden = terms.filter(|terms| terms.hidden > 0.0).map(|_| sums.hidden * scale);
        Ok(StepGradients { loss: sums.nll * scale, norm, gradients, kl, hidden, router, tally })
    })
}

/// Losses summed over supervised tokens.
#[derive(Default)]
struct Sums {
    nll: f64,
    kl: f64,
    hidden: f64,
}

impl Sums {
    fn of(losses: &distillation::Losses) -> Self {
        let [nll, kl, hidden] = [&losses.nll, &losses.kl, &losses.hidden]
            .map(|losses| losses.iter().map(|loss| f64::from(*loss)).sum());
        Self { nll, kl, hidden }
    }

    fn add(&mut self, other: &Self) {
        self.nll += other.nll;
        self.kl += other.kl;
        self.hidden += other.hidden;
    }
}

/// Tokens that are computed at once.
struct Piece<'a> {
    batch: &'a Batch,
    /// What losses of tokens are multiplied with.
    scale: f64,
    /// Its share of the step's tokens.
    share: f64,
    dropout_step: Option<u64>,
    recompute: Recompute,
    objective: &'a Objective<'a>,
}

impl Piece<'_> {
    /// Adds the gradients of `scale` times the summed losses and of the losses on routers; gives the sums and these.
    fn accumulate(
        &self,
        model: &Decoder,
        gradients: &mut Gradients,
        tally: &mut Tally,
    ) -> Result<(Sums, Terms)> {
        let Self { batch, scale, share, dropout_step, recompute, objective } = *self;
        let (rows, targets) = batch.targets();
        if targets.is_empty() {
            return Ok((Sums::default(), Terms::default()));
        }
        let documents = Documents::new(batch.offsets.clone(), batch.documents.clone());
        // Before anything is kept for a backward, so that the memory of both forwards is not needed at once.
        let of_teacher = match &objective.teacher {
            None => None,
            Some(teacher) => {
                let output = teacher.model.forward(&batch.tokens, &documents)?;
                Some((teacher, rows::gather(&output.hidden, &rows)?)) // [supervised, hidden of the teacher]
            }
        };
        let pass = Pass::training(&documents, dropout_step);
        let (output, saved) = model.forward_training(&batch.tokens, &pass, recompute, gradients)?;
        tally.add(&output.routing);
        let (terms, of_losses) = objective.losses.of(&output.routing, share)?;
        let predicting = rows::gather(&output.hidden, &rows)?; // [supervised, hidden]
        let (losses, saved_loss) = match &of_teacher {
            None => {
                let head = model.head();
                let (nll, saved) = cross_entropy::forward(&predicting, head, &targets, scale, gradients)?;
                (distillation::Losses { nll, ..distillation::Losses::default() }, saved)
            }
            Some((teacher, hidden)) => {
                let (head, terms) = (teacher.model.head(), teacher.terms);
                let teacher = distillation::Teacher { hidden, head, terms };
                distillation::forward(&predicting, model.head(), &targets, &teacher, scale, gradients)?
            }
        };
        let d_hidden = rows::scatter(&cross_entropy::backward(saved_loss), &rows, batch.tokens.len())?;
        drop((output, predicting, of_teacher));
        model.backward_with_routing(saved, &pass, &d_hidden, &of_losses, gradients)?;
        Ok((Sums::of(&losses), terms))
    }
}
