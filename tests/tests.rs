//! One integration binary, a file per promise.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

/// An account of a conversion says what its numbers mean, and what would make them misleading is refused or warned of.
mod account;
/// Adapters made by PEFT are read as PEFT reads them; what cannot be is refused by name.
mod adapter;
/// Prompts from the command line, stdin, a file and a chat are answered, each as it is alone; and what shells and manuals get.
mod answers;
/// The page of attacks and accidents names tests that exist.
mod attacks;
/// A checkpoint that changed on disk is named, and the newest whole one is used.
mod broken;
/// Commands, help and messages as a user sees them.
mod cli;
/// Every command on a tiny model, from the recipe to the run directory.
mod commands;
/// Configurations of other tools become recipes, and nothing of them is dropped in silence.
mod converted;
/// Copies are the dense model however many are active; experts more leave a mixture what it is where its choice has a bias.
mod copies;
/// Conversations, labels and order of training data, as transformers has them.
mod data;
/// Bytes from a server that errs or means harm: the token stays at home, nothing is written elsewhere, nothing hangs.
mod downloads;
/// The order of experts means nothing, room enough is no limit, idle experts learn nothing; bad mixtures are refused, and
/// adapters on all experts together are read in every layout.
mod experts;
/// Memory that is refused and files that change under a command end it with a message, and nothing false is published.
mod faults;
/// A fixture folder made by transformers and PEFT.
mod fixture;
/// Mutated files of every kind are read or refused, with bounded time and memory, and leave nothing behind.
mod fuzz;
/// Tokens generated with a cache are those of a forward over everything.
mod generate;
/// Each op's value and gradients against its reference, differentiated by candle, and against finite differences.
mod gradients;
/// A mixture made of a dense model shares weights with it, is trained in fitting steps, and learns to be like it.
mod heal;
/// Models come from the Hub as a whole or not at all, with what a user has to know when they do not.
mod hub;
/// Instructions are chosen by name, and all of them compute the same models to rounding.
mod kernels;
/// Who may use whom, that no files use each other in a circle, and how long a file may be.
mod layering;
/// Ten optimizer steps against ten golden losses.
mod losses;
/// A run takes the memory that was predicted, and chooses by it.
mod memory;
/// Merged weights are those of PEFT, compute what the adapter computes, and are the base's elsewhere.
mod merge;
/// Tokens are routed as transformers routes them, in every layout of the weights; an idle expert learns nothing.
mod moe;
/// The published toy outputs of a course, from the seeds alone.
mod nju;
/// An output is understood before the work, and nothing that others made is removed or written over.
mod outputs;
/// Logits, losses and every gradient against transformers and PEFT, for each family.
mod parity;
/// Tensors that merging and upcycling copy hold numbers, or nothing is written; those of odd types are named.
mod passed_on;
/// A tiny model, its data and a recipe in a folder of their own.
mod place;
/// GGUF models whose matrices stay quantized compute what their values compute, and are trained beside, never themselves.
mod quantized;
/// What files say twice, or beside weights, is read as transformers reads it, and said.
mod readings;
/// Recipes as they are written, planned and written again.
mod recipes;
/// Bad input is refused with what is wrong and what to do, and leaves nothing behind.
mod refusals;
/// Devices, pipes and huge files are refused at once, and nothing from outside of a model gets into a copy of it.
mod regular;
/// A killed or interrupted run goes on to the same bits, and leaves nothing half-written.
mod resume;
/// What of routers and experts an adapter is, from run to run; what of routing cannot work is refused.
mod routers;
/// All that a row of data says is trained on or named, and files that are no rows are named for what they are.
mod rows;
/// Sizes that no file can hold and values that no model can have are refused before anything is made of them.
mod sizes;
/// Templates and tokenizers of strangers run within bounds, and what becomes of the text of the data is said.
mod templates;
/// Control characters from files and models are shown, not obeyed.
mod terminal;
/// Slices are the dense model when all are on; what is written is seeded, whole, and of the bits it came from.
mod upcycle;
/// Checkpoints are read to the last bit, refused by what is wrong with them, written whole or not at all.
mod weights;
