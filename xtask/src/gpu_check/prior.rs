//! Priors to train on a device: small, over made-up codes of two levels.

use std::path::Path;

use candle_core::Device;
use tempfile::TempDir;
use vq_data::{
    CODES_FORMAT_VERSION, CODES_ORDER, CodesLevel, CodesManifest, CodesWriter, Normalization,
};
use vq_model::{Config, LevelConfig, VqVae};
use vq_train::{PriorRecipe, PriorTask, Trainer, load_model, model_hash};

use super::training::{BATCH, Result, STEPS};

/// Side of the grid and codes of each level.
const LEVELS: [(usize, usize); 2] = [(8, 32), (4, 16)];

#[derive(Clone, Copy)]
pub(super) enum Kind {
    PixelCnn,
    Transformer,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::PixelCnn => "a PixelCNN",
            Self::Transformer => "a Transformer",
        }
    }

    fn recipe(self) -> vq_train::Result<PriorRecipe> {
        match self {
            Self::PixelCnn => {
                let text = include_str!("../../../configs/prior-pixelcnn.toml");
                PriorRecipe::from_toml(text, "prior-pixelcnn")?
                    .with_override("prior.network.layers=3")
            }
            Self::Transformer => {
                let text = include_str!("../../../configs/prior-transformer.toml");
                PriorRecipe::from_toml(text, "prior-transformer")?
                    .with_override("prior.network.layers=2")
            }
        }
    }
}

/// A recipe for the bottom level under the top one, with a model and its codes.
pub(super) struct PriorFolder {
    recipe: PriorRecipe,
    hash: String,
    folder: TempDir,
}

impl PriorFolder {
    pub(super) fn new(kind: Kind) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let mut config = Config { image_size: [16, 16], ..Config::default() };
        let level = |(_, size): (usize, usize)| {
            let mut level = LevelConfig { downsample: 2, hidden: 8, ..LevelConfig::default() };
            (level.residual_blocks, level.residual_hidden) = (1, 4);
            (level.quantizer.codebook_size, level.quantizer.dim) = (size, 4);
            level
        };
        config.levels = LEVELS.map(level).to_vec();
        config.class_names = ["a", "b"].map(str::to_owned).to_vec();
        let path = folder.path().join("model");
        VqVae::new(&config, 0, &Device::Cpu)?.save(&path)?;
        let hash = model_hash(&path)?;
        let mut recipe = kind.recipe()?;
        for change in [
            "train.schedule=constant",
            "train.warmup_steps=0",
            "train.lr=0.001",
            "train.samples=0",
            "train.eval_every=1000",
            "prior.dropout=0.1",
            "data.level=0",
        ] {
            recipe = recipe.with_override(change)?;
        }
        recipe.train.batch_size = BATCH;
        recipe.data.model = path;
        recipe.data.codes = folder.path().join("codes");
        write_codes(&recipe.data.codes, &hash)?;
        Ok(Self { recipe, hash, folder })
    }

    pub(super) fn trainer(
        &self,
        epochs: usize,
        device: &Device,
        run: &Path,
    ) -> Result<Trainer<PriorTask>> {
        let mut recipe = self.recipe.clone();
        recipe.train.epochs = epochs;
        let model = load_model(self.folder.path().join("model"), device)?;
        let task = PriorTask::new(&mut recipe, model, &self.hash, device)?;
        Ok(Trainer::new(task, &recipe.train.resolve(), run)?)
    }
}

/// As many images as make [`STEPS`] steps and some to hold out; each code follows from its place, the class
/// and the codes above.
fn write_codes(folder: &Path, hash: &str) -> Result<()> {
    let images = STEPS * BATCH + STEPS * BATCH / 8;
    let level = |(side, size): (usize, usize)| CodesLevel {
        grid: [side, side],
        codebook_sizes: vec![size],
    };
    let manifest = CodesManifest {
        format_version: CODES_FORMAT_VERSION,
        model: hash.to_owned(),
        precision: "f32".to_owned(),
        normalization: Normalization::identity(3),
        dataset: "made up".to_owned(),
        split: "train".to_owned(),
        order: CODES_ORDER.to_owned(),
        images,
        images_per_shard: images,
        class_names: ["a", "b"].map(str::to_owned).to_vec(),
        levels: LEVELS.map(level).to_vec(),
    };
    let mut writer = CodesWriter::open(folder, manifest)?;
    for image in 0..images {
        let class = image % 2;
        let top: Vec<u32> =
            (0..16).map(|place| ((image / 2 + place * (class + 1)) % 16) as u32).collect();
        let bottom = (0..64).map(|place| {
            let above = top.get(place / 16 * 4 + place % 8 / 2).copied().unwrap_or_default();
            (place as u32 / 8 + above + class as u32) % 32
        });
        writer.push(class as u32, &[&bottom.collect::<Vec<_>>(), &top])?;
    }
    writer.finish()?;
    Ok(())
}
