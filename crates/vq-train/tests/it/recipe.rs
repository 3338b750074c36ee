//! Recipes: reading, overriding, writing, refusing.

use std::path::{Path, PathBuf};

use vq_model::{CodebookRule, Config, LevelConfig};
use vq_train::{Recipe, Schedule};

fn configs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs")
}

fn read(name: &str) -> Recipe {
    let recipe = Recipe::from_file(&configs().join(name)).unwrap();
    recipe.validate().unwrap();
    recipe
}

#[test]
fn the_default_is_cifar10() {
    // A packaged crate stands alone.
    if !configs().is_dir() {
        return;
    }
    assert_eq!(read("cifar10.toml"), Recipe::default());
    assert_eq!((Recipe::default().train.epochs, Recipe::default().train.batch_size), (50, 128));
    assert!((Recipe::default().model.bits_per_image() - 576.0).abs() < 1e-9);
    assert_eq!(Recipe::from_toml("", "empty").unwrap(), Recipe::default());
}

#[test]
fn cifar10_toml_writes_every_key() {
    if !configs().is_dir() {
        return;
    }
    let text = std::fs::read_to_string(configs().join("cifar10.toml")).unwrap();
    let key = |line: &str| line.split_once(" = ").map(|(key, _)| key.to_owned());
    let keys = |text: &str| {
        let mut keys: Vec<String> =
            text.lines().filter(|l| !l.starts_with('#')).filter_map(key).collect();
        keys.sort();
        keys
    };
    assert_eq!(keys(&text), keys(&Recipe::default().to_toml().unwrap()));
}

#[test]
fn the_papers_recipe_is_the_plain_formula() {
    if !configs().is_dir() {
        return;
    }
    let recipe = read("cifar10-paper.toml");
    let train = &recipe.train;
    assert_eq!(recipe.model, Config::default());
    assert_eq!(recipe.model.levels[0].quantizer.rule, CodebookRule::Gradient);
    assert_eq!((train.schedule, train.warmup_steps), (Schedule::Constant, 0));
    assert_eq!((train.lr, train.beta, train.normalize_by_variance), (3e-4, 0.25, true));
    assert_eq!((train.weight_decay, train.grad_clip, train.weight_ema, train.l1), (0., 0., 0., 0.));
    assert_eq!((train.kmeans.rounds, train.revival.threshold), (0, 0.0));
    read("shapes.toml");
}

#[test]
fn keys_that_are_left_out_take_the_default_recipes_value() {
    let text = "
        [model]
        image_size = [64, 64]
        [[model.levels]]
        downsample = 4
        [[model.levels]]
        downsample = 2
        quantizer = { codebook_size = 8 }
        [train]
        kmeans = { vectors = 100 }";
    let recipe = Recipe::from_toml(text, "test").unwrap();
    recipe.validate().unwrap();
    let level = Recipe::default().model.levels[0].clone();
    assert_eq!(recipe.model.levels[0], level);
    // Not LevelConfig's own default, whose rule is another.
    assert_ne!(recipe.model.levels[0], LevelConfig::default());
    assert_eq!(recipe.model.levels[1].downsample, 2);
    assert_eq!(recipe.model.levels[1].quantizer.codebook_size, 8);
    assert_eq!(recipe.model.levels[1].quantizer.rule, CodebookRule::Ema);
    assert_eq!((recipe.train.kmeans.rounds, recipe.train.kmeans.vectors), (10, 100));
    assert_eq!(recipe.train.epochs, 50);
}

#[test]
fn a_resolved_recipe_reads_back_as_it_is() {
    let mut recipe = Recipe::default();
    for assignment in [
        "model.normalization.mean=[0.4914, 0.4822, 0.4465]",
        "model.normalization.std=[0.2470, 0.2435, 0.2616]",
        "data.source=folder:/a b/c",
        "train.lr=0.0003",
        "train.seed=9223372036854775807",
        "train.weight_ema=0.999",
        "train.schedule=constant",
        "data.on_broken=refuse",
    ] {
        recipe = recipe.with_override(assignment).unwrap();
    }
    recipe.validate().unwrap();
    let text = recipe.to_toml().unwrap();
    assert_eq!(Recipe::from_toml(&text, "test").unwrap(), recipe);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.toml");
    recipe.save(&path).unwrap();
    assert_eq!(Recipe::from_file(&path).unwrap(), recipe);
}

#[test]
fn mistakes_in_a_file_are_named_by_line() {
    for (text, parts) in [
        ("[train]\nepoch = 3", vec!["line 2", "epoch", "epochs"]),
        ("[train]\n\nepochs = 'many'", vec!["line 3", "epochs", "string"]),
        ("[train]\nepochs = -1", vec!["line 2", "epochs = -1"]),
        ("[train\nepochs = 1", vec!["line 1"]),
        ("[data]\nsource = 'cifar'", vec!["line 2", "cifar", "folder:PATH"]),
        ("[[model.levels]]\nquantizer = { size = 1 }", vec!["line 2", "size"]),
        ("[train]\nschedule = 'linear'", vec!["line 2", "constant", "cosine"]),
    ] {
        let error = Recipe::from_toml(text, "my.toml").unwrap_err().to_string();
        for part in parts.iter().chain(&["my.toml"]) {
            assert!(error.contains(part), "{part}: {error}");
        }
        assert!(!error.contains('\n'), "{error}");
    }
}

#[test]
fn overrides_are_checked_and_name_their_key() {
    let recipe = Recipe::default();
    let set = |assignment: &str| recipe.with_override(assignment).unwrap();
    assert_eq!(set("train.epochs=3").train.epochs, 3);
    assert_eq!(set("train.epochs = 3").train.epochs, 3);
    assert!((set("train.lr=1").train.lr - 1.0).abs() < 1e-12);
    assert_eq!(set("model.levels.0.quantizer.dim=8").model.levels[0].quantizer.dim, 8);
    assert_eq!(set("model.image_size=[64, 32]").model.image_size, [64, 32]);
    assert_eq!(set("data.source=folder:a=b").data.source.to_string(), "folder:a=b");
    assert_eq!(set("data.dir=12").data.dir, Path::new("12"));
    assert_eq!(set("model.class_names=['a', 'b']").model.class_names, ["a", "b"]);

    for (assignment, part) in [
        ("train.epochs", "key=value"),
        ("train.epochs=many", "string"),
        ("train.epochs=1.5", "1.5"),
        ("train.epochs=-1", "-1"),
        ("train.epoch=3", "epochs"),
        ("trian.epochs=3", "train"),
        ("train.epochs.x=3", "`x`"),
        ("model.levels.1.hidden=8", "index below 1"),
        ("model.levels.0.quantizer.rule=magic", "gradient"),
        ("train=3", "3"),
        ("=3", "no key"),
    ] {
        let error = recipe.with_override(assignment).unwrap_err().to_string();
        let key = assignment.split('=').next().unwrap();
        assert!(
            error.contains(&format!("`{key}`")) && error.contains(part),
            "{assignment}: {error}"
        );
    }
}

#[test]
fn values_out_of_range_are_named_by_key() {
    for (assignment, key) in [
        ("train.epochs=0", "train.epochs"),
        ("train.batch_size=0", "train.batch_size"),
        ("train.accumulate=0", "train.accumulate"),
        ("train.accumulate=129", "train.accumulate"),
        ("train.lr=0", "train.lr"),
        ("train.lr=nan", "train.lr"),
        ("train.min_lr=1", "train.min_lr"),
        ("train.beta1=1", "train.beta1"),
        ("train.weight_ema=1", "train.weight_ema"),
        ("train.weight_decay=-1", "train.weight_decay"),
        ("train.grad_clip=inf", "train.grad_clip"),
        ("train.eps=0", "train.eps"),
        ("train.beta=-0.25", "train.beta"),
        ("train.eval_every=0", "train.eval_every"),
        ("train.log_every=0", "train.log_every"),
        ("train.keep_checkpoints=0", "train.keep_checkpoints"),
        ("train.revival.threshold=-1", "train.revival.threshold"),
        ("data.train_count=0", "data.train_count"),
        ("model.levels.0.quantizer.codebook_size=0", "model.levels.0.quantizer.codebook_size"),
        ("model.image_size=[33, 32]", "model.image_size.0"),
        ("model.levels=[]", "model.levels"),
        ("model.mixtures=0", "model.mixtures"),
    ] {
        let recipe = Recipe::default().with_override(assignment).unwrap();
        let error = recipe.validate().unwrap_err().to_string();
        assert!(error.starts_with(key), "{assignment}: {error}");
    }
    let both = Recipe::default().with_override("model.likelihood=categorical").unwrap();
    let both = both.with_override("train.l1=0.5").unwrap();
    let error = both.validate().unwrap_err().to_string();
    assert!(error.starts_with("train.l1 must be 0 with a likelihood"), "{error}");
}

#[test]
fn a_resumed_run_may_change_what_the_position_does_not_depend_on() {
    let was = Recipe::default();
    let set = |assignment: &str| was.with_override(assignment).unwrap();
    assert_eq!(was.check_resume(&was).unwrap(), [""; 0]);
    assert_eq!(set("train.epochs=60").check_resume(&was).unwrap(), ["train.epochs: 50 → 60"]);
    for assignment in [
        "model.levels.0.hidden=64",
        "train.batch_size=64",
        "train.seed=1",
        "data.source=shapes",
        "data.flip=true",
    ] {
        let error = set(assignment).check_resume(&was).unwrap_err().to_string();
        let key = assignment.split('=').next().unwrap();
        assert!(error.contains(key) && error.contains("--out"), "{error}");
    }
    let two = Recipe::from_toml("[[model.levels]]\n[[model.levels]]\ndownsample = 2", "t").unwrap();
    assert!(two.check_resume(&was).unwrap_err().to_string().contains("model.levels.1."));
}

#[test]
fn another_kind_of_quantizer_leaves_the_old_ones_keys_behind() {
    let text = "[[model.levels]]\nquantizer = { kind = 'finite-scalar', levels = [8, 5] }";
    let written = Recipe::from_toml(text, "test").unwrap();
    written.validate().unwrap();
    let default = Recipe::default();
    let set = default
        .with_override("model.levels.0.quantizer.kind=finite-scalar")
        .and_then(|recipe| recipe.with_override("model.levels.0.quantizer.levels=[8, 5]"))
        .unwrap();
    assert_eq!(written, set);
    assert_eq!(set.model.levels[0].quantizer, vq_model::QuantizerConfig::finite_scalar(&[8, 5]));
    assert_eq!(Recipe::from_toml(&set.to_toml().unwrap(), "test").unwrap(), set);
    // What both kinds have stays.
    let product = default.with_override("model.levels.0.quantizer.kind=product").unwrap();
    product.validate().unwrap();
    let quantizer = &product.model.levels[0].quantizer;
    assert_eq!((quantizer.rule, quantizer.groups), (CodebookRule::Ema, 2));
    // A key that the kind does not have is refused where it is written.
    let text = "[[model.levels]]\nquantizer = { kind = 'sim', rule = 'ema' }";
    let message = Recipe::from_toml(text, "test").unwrap_err().to_string();
    assert!(message.contains("`rule`") && message.contains("`sim`"), "{message}");
    assert!(message.contains("line 2"), "{message}");
    let message = set.with_override("model.levels.0.quantizer.rule=ema").unwrap_err().to_string();
    assert!(message.contains("rule"), "{message}");
    let message =
        default.with_override("model.levels.0.quantizer.kind=fsq").unwrap_err().to_string();
    assert!(message.contains("finite-scalar"), "{message}");
    // A run does not go on with another kind.
    let message = set.check_resume(&default).unwrap_err().to_string();
    assert!(message.contains("model.levels.0.quantizer."), "{message}");
    // A second level on a copy of the first may be of another kind.
    let text = "[[model.levels]]\n[[model.levels]]\ndownsample = 2\nquantizer.kind = 'lookup-free'";
    let two = Recipe::from_toml(text, "test").unwrap();
    two.validate().unwrap();
    assert_eq!(two.model.levels[0].quantizer.rule, CodebookRule::Ema);
    assert_eq!(two.model.levels[1].quantizer, vq_model::QuantizerConfig::lookup_free(9));
}
