//! Errors: one line that says what to do.

use vq_train::{Checkpoints, Error};

use crate::support::{recipe, tokenizer, train, trainer};

fn refused(more: &[&str]) -> String {
    let error = tokenizer(&recipe(more)).err().unwrap().to_string();
    assert!(!error.contains('\n'), "{error}");
    error
}

#[test]
fn data_that_does_not_fit_is_refused() {
    assert!(refused(&["train.batch_size=1000"]).contains("batch_size"));
    assert!(
        refused(&[
            "model.channels=1",
            "model.normalization.mean=[0.5]",
            "model.normalization.std=[1.0]"
        ])
        .contains("model.channels")
    );
    assert!(refused(&["data.source=folder:/nowhere/at/all"]).contains("/nowhere/at/all"));
}

#[test]
fn a_folder_that_cannot_be_written_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let error = trainer(&recipe(&[]), &file).err().unwrap().to_string();
    assert!(error.contains("file") && error.contains("--out") && !error.contains('\n'), "{error}");

    // In the middle of a run: the checkpoints' folder goes away.
    let run = folder.path().join("run");
    let mut trainer = trainer(&recipe(&["train.epochs=1"]), &run).unwrap();
    std::fs::write(run.join("checkpoints"), "in the way").unwrap();
    let error = trainer.run().unwrap_err();
    assert!(matches!(error, Error::Write { .. }), "{error:?}");
    assert!(error.to_string().contains("checkpoints"), "{error}");
    let names: Vec<_> =
        std::fs::read_dir(&run).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 4, "recipe, metrics, the lock and the file in the way: {names:?}");
}

#[test]
fn a_checkpoint_of_another_architecture_is_refused_where_it_lies() {
    let folder = tempfile::tempdir().unwrap();
    train(&recipe(&["train.epochs=1"]), folder.path());
    let other = recipe(&["train.epochs=1", "model.levels.0.hidden=16"]);
    let mut trainer =
        vq_train::Trainer::new(tokenizer(&other).unwrap(), &other.train, folder.path()).unwrap();
    let error = trainer.resume().err().unwrap().to_string();
    assert!(error.contains("model.levels.0.hidden") && error.contains("--out"), "{error}");
    assert_eq!(Checkpoints::new(folder.path()).list().unwrap().len(), 1);
}
