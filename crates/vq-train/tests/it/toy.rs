//! The loop, with something to train that watches it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use candle_core::Var;
use vq_train::{
    Evaluation, Figures, Forward, Metrics, Result, TrainConfig, Trainable, Trainer, Update,
    read_progress,
};

/// Minimises ‖w − 1‖²; the codebook's gradient is next to nothing, and `unused` has none.
struct Toy {
    parameters: BTreeMap<String, Var>,
    scale: f64,
    calls: RefCell<Vec<String>>,
}

impl Toy {
    fn new(scale: f64) -> Self {
        let var = |values: &[f32]| {
            Var::from_slice(values, (2, values.len() / 2), &vq_ops::test_device()).unwrap()
        };
        let parameters = BTreeMap::from([
            ("codebook".to_owned(), var(&[0.5, 0.5])),
            ("unused".to_owned(), var(&[3.0, 4.0])),
            ("weight".to_owned(), var(&[0.0, 0.0])),
        ]);
        Self { parameters, scale, calls: RefCell::default() }
    }

    fn weight(&self) -> f32 {
        self.values("weight")[0]
    }

    fn values(&self, name: &str) -> Vec<f32> {
        self.parameters[name].flatten_all().unwrap().to_vec1().unwrap()
    }

    fn note(&self, call: &str) {
        self.calls.borrow_mut().push(format!("{call} {}", self.weight()));
    }
}

impl Trainable for Toy {
    type Batch = ();
    type Residue = f32;

    fn batches_per_epoch(&self) -> usize {
        2
    }

    fn batches(&self, _: u64, first: usize) -> Box<dyn Iterator<Item = Result<()>> + Send> {
        Box::new((first..2).map(|_| Ok(())))
    }

    fn parameters(&self) -> &BTreeMap<String, Var> {
        &self.parameters
    }

    fn decays(&self, name: &str, _: &Var) -> bool {
        name != "codebook"
    }

    fn prepare(&mut self, _: &AtomicBool) -> Result<bool> {
        self.note("prepare");
        Ok(true)
    }

    fn forward(&self, (): &(), _: u64) -> Result<Forward<f32>> {
        self.note("forward");
        let loss = (self.parameters["weight"].affine(1.0, -1.0)?.sqr()?.sum_all()? * self.scale)?;
        let loss = (loss + (self.parameters["codebook"].sum_all()? * 1e-30)?)?;
        let figures = Figures::new().with("loss", &loss);
        Ok(Forward { loss, figures, examples: 1, residue: self.weight() })
    }

    fn update(&mut self, before: f32, step: u64) -> Result<Update> {
        assert!((before - self.weight()).abs() > 0.0, "the optimizer has moved the weight already");
        self.note(&format!("update {step}"));
        Ok(Update::default())
    }

    fn evaluate(&self, _: &AtomicBool) -> Result<Option<Evaluation>> {
        self.note("evaluate");
        let metrics = Metrics::new().with("weight", f64::from(self.weight()));
        Ok(Some(Evaluation { metrics, score: 0.0, usage: Vec::new(), samples: None, drawn: None }))
    }

    fn save(&self, folder: &Path) -> Result<()> {
        self.note("save");
        std::fs::write(folder.join("weight"), self.weight().to_string()).unwrap();
        Ok(())
    }

    fn load(&mut self, _: &Path) -> Result<()> {
        Ok(())
    }
}

fn plain() -> TrainConfig {
    TrainConfig {
        epochs: 1,
        lr: 0.1,
        warmup_steps: 0,
        schedule: vq_train::Schedule::Constant,
        weight_decay: 0.0,
        grad_clip: 0.0,
        ..TrainConfig::default()
    }
}

fn train(config: &TrainConfig, scale: f64, run: &Path) -> Toy {
    let mut trainer = Trainer::new(Toy::new(scale), config, run).unwrap();
    trainer.run().unwrap();
    let weight = trainer.task().weight();
    let calls = trainer.task().calls.borrow().clone();
    let parameters = trainer.task().parameters.clone();
    assert!(weight.is_finite());
    Toy { parameters, scale, calls: RefCell::new(calls) }
}

/// Point 9: prepare once; forward, optimizer, update; evaluation in between never updates.
#[test]
fn the_order_within_a_step() {
    let run = tempfile::tempdir().unwrap();
    let toy = train(&TrainConfig { epochs: 2, ..plain() }, 1.0, run.path());
    let names: Vec<String> =
        toy.calls.borrow().iter().map(|call| call.split(' ').next().unwrap().to_owned()).collect();
    let epoch = ["forward", "update", "forward", "update", "evaluate", "save"];
    assert_eq!(names, [&["prepare"][..], &epoch, &epoch].concat());
}

/// Adam's step does not depend on the gradient's scale; so clipping, which is one factor for all
/// steps here, must not either, while the reported norm is the one before it.
#[test]
fn adam_and_clipping() {
    let run = tempfile::tempdir().unwrap();
    let toy = train(&TrainConfig { epochs: 1, ..plain() }, 1.0, run.path());
    // Two steps of about lr each.
    assert!((toy.weight() - 0.2).abs() < 0.01, "{}", toy.weight());
    let clipped = train(&TrainConfig { grad_clip: 1e-3, ..plain() }, 1.0, run.path());
    assert!((clipped.weight() - 0.2).abs() < 0.01, "{}", clipped.weight());
    // With an ε that rivals the gradient, the clipped one moves the weight less.
    let config = TrainConfig { eps: 1.0, ..plain() };
    let free = train(&config, 1.0, run.path()).weight();
    let clipped = train(&TrainConfig { grad_clip: 1e-3, ..config }, 1.0, run.path()).weight();
    assert!(clipped < 0.01 * free, "{clipped} {free}");
}

#[test]
fn a_parameter_without_a_gradient_stays_and_only_weights_decay() {
    let run = tempfile::tempdir().unwrap();
    let decayed = train(&TrainConfig { weight_decay: 0.5, ..plain() }, 1.0, run.path());
    assert_eq!(decayed.values("unused"), [3.0, 4.0]);
    assert_eq!(decayed.values("codebook"), [0.5, 0.5]);
    let free = train(&plain(), 1.0, run.path());
    assert!(decayed.weight() < free.weight());
}

#[test]
fn the_average_is_what_is_evaluated_and_saved() {
    let run = tempfile::tempdir().unwrap();
    let toy = train(&TrainConfig { weight_ema: 0.999, ..plain() }, 1.0, run.path());
    let history = read_progress(&run.path().join("last")).unwrap().history;
    let evaluated = history[0].test.as_ref().unwrap().get("weight").unwrap();
    let saved: f64 =
        std::fs::read_to_string(run.path().join("last/weight")).unwrap().parse().unwrap();
    // w₀ = 0; w₁, w₂ from the steps; decays 2/11 and 3/12.
    let w: Vec<f64> = toy
        .calls
        .borrow()
        .iter()
        .filter(|call| call.starts_with("update"))
        .map(|call| call.rsplit(' ').next().unwrap().parse().unwrap())
        .collect();
    let first = 9.0 / 11.0 * w[0];
    let expected = 0.25 * first + 0.75 * w[1];
    assert!((evaluated - expected).abs() < 1e-6, "{evaluated} {expected}");
    assert!((saved - expected).abs() < 1e-6);
    // Training itself goes on from the raw weights.
    assert!((f64::from(toy.weight()) - w[1]).abs() < 1e-7);
}
