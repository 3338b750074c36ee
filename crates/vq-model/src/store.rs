//! A model as a folder: `config.json` and `model.safetensors`; and the parts of that, for the other models
//! that are stored alike.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use candle_core::{Device, Tensor, Var};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Config, Error, FORMAT_VERSION, Result, VqVae};

/// The name of the architecture's file in a model's folder.
pub const CONFIG_FILE: &str = "config.json";
/// The name of the tensors' file in a model's folder.
pub const MODEL_FILE: &str = "model.safetensors";

impl VqVae {
    /// Reads the folder that [`save`](Self::save) wrote: `config.json` and `model.safetensors`.
    pub fn from_pretrained(folder: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let folder = folder.as_ref();
        let of_run = folder.join("best");
        if !folder.join(CONFIG_FILE).exists() && of_run.join(CONFIG_FILE).exists() {
            let (folder, of_run) = (folder.display(), of_run.display());
            return Err(Error::Input(format!(
                "{folder} is a run's folder; its model is in {of_run}"
            )));
        }
        let config = Config::load(folder.join(CONFIG_FILE))?;
        let model = Self::new(&config, 0, device)?;
        let path = folder.join(MODEL_FILE);
        let tensors = read_tensors(&path)?;
        model.set_tensors_from(&path.display().to_string(), &tensors)?;
        Ok(model)
    }

    /// Writes `config.json` and `model.safetensors` into `folder`, which is made if it is missing. Each
    /// file is written beside its place, synced and renamed, so that there is always a whole one. The
    /// same model gives the same bytes.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        fs::create_dir_all(folder).map_err(Error::write(folder))?;
        write_tensors(&folder.join(MODEL_FILE), &self.tensors())?;
        self.config().save(folder.join(CONFIG_FILE))
    }

    /// All parameters and buffers by name: what [`save`](Self::save) stores. They share the model's memory.
    pub fn tensors(&self) -> BTreeMap<String, Tensor> {
        let vars = self.parameters().iter().chain(self.buffers());
        vars.map(|(name, var)| (name.clone(), var.as_detached_tensor())).collect()
    }

    /// Copies `tensors` into the parameters and buffers. Names and shapes must be exactly those of
    /// [`tensors`](Self::tensors), and all values finite; otherwise the model stays as it was.
    pub fn set_tensors(&self, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        self.set_tensors_from("the given tensors", tensors)
    }

    fn set_tensors_from(&self, origin: &str, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        let vars = self.parameters().iter().chain(self.buffers());
        assign(origin, &vars.collect(), tensors)
    }
}

impl Config {
    /// Reads and checks a `config.json`.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        load_config(path.as_ref(), Self::validate)
    }

    /// Writes a `config.json`, with the format's version, atomically.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        save_config(path.as_ref(), self)
    }
}

/// Reads a `config.json` with the format's version in it, and checks it by `validate`.
pub fn load_config<T: DeserializeOwned>(
    path: &Path,
    validate: impl FnOnce(&T) -> Result<()>,
) -> Result<T> {
    let text = fs::read_to_string(path).map_err(Error::read(path))?;
    let syntax = |source| Error::ConfigFile { path: path.to_path_buf(), source };
    let mut value: serde_json::Value = serde_json::from_str(&text).map_err(syntax)?;
    let invalid = |key: &str, problem: String| Error::ConfigValue {
        path: path.to_path_buf(),
        source: Box::new(Error::config(key, problem)),
    };
    let Some(object) = value.as_object_mut() else {
        return Err(invalid("the config", "must be a JSON object".to_owned()));
    };
    // Files without it were written by hand.
    let version = object.remove("format_version").unwrap_or(FORMAT_VERSION.into());
    match version.as_u64() {
        Some(found) if found > u64::from(FORMAT_VERSION) => {
            let path = path.to_path_buf();
            return Err(Error::FormatVersion { path, found, supported: FORMAT_VERSION });
        }
        Some(found) if found > 0 => {}
        _ => {
            let problem = format!("must be 1 to {FORMAT_VERSION}, got {version}");
            return Err(invalid("format_version", problem));
        }
    }
    let config: T = serde_json::from_value(value).map_err(syntax)?;
    validate(&config).map_err(|source| Error::ConfigValue {
        path: path.to_path_buf(),
        source: Box::new(source),
    })?;
    Ok(config)
}

/// Writes a `config.json`, with the format's version, atomically.
pub fn save_config<T: Serialize>(path: &Path, config: &T) -> Result<()> {
    #[derive(Serialize)]
    struct Stored<'a, T> {
        format_version: u32,
        #[serde(flatten)]
        config: &'a T,
    }
    let stored = Stored { format_version: FORMAT_VERSION, config };
    let mut text = serde_json::to_string_pretty(&stored)
        .map_err(|source| Error::ConfigFile { path: path.to_path_buf(), source })?;
    text.push('\n');
    write_atomic(path, text.as_bytes())
}

/// The tensors of a `.safetensors` file by name, on the CPU; all must be f32.
pub fn read_tensors(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    let bytes = fs::read(path).map_err(Error::read(path))?;
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|source| Error::Damaged { path: path.to_path_buf(), source })?;
    let origin = path.display().to_string();
    let mut tensors = BTreeMap::new();
    for (name, view) in file.tensors() {
        tensors.insert(name.clone(), tensor(&origin, &name, &view)?);
    }
    Ok(tensors)
}

/// Writes f32 tensors as a `.safetensors` file, atomically. The same tensors give the same bytes.
pub fn write_tensors(path: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    let mut data = Vec::new();
    for (name, tensor) in tensors {
        let values = tensor.flatten_all()?.to_vec1::<f32>()?;
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        data.push((name, tensor.dims().to_vec(), bytes));
    }
    let views = data.iter().map(|(name, shape, bytes)| {
        Ok((name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes)?))
    });
    let serialized = views
        .collect::<std::result::Result<Vec<_>, _>>()
        .and_then(|views| safetensors::serialize(views, None))
        .map_err(|error| Error::Candle(candle_core::Error::SafeTensor(error)))?;
    write_atomic(path, &serialized)
}

/// Copies `tensors`, which came from `origin`, into the variables. Names and shapes must be exactly those
/// of the variables, and all values finite; otherwise these stay as they were.
pub fn assign(
    origin: &str,
    vars: &BTreeMap<&String, &Var>,
    tensors: &BTreeMap<String, Tensor>,
) -> Result<()> {
    let other = |problem| Error::Architecture { origin: origin.to_owned(), problem };
    for (name, expected) in vars {
        let Some(tensor) = tensors.get(*name) else {
            let shape = expected.dims();
            return Err(other(format!("tensor `{name}` {shape:?} is missing")));
        };
        if tensor.dims() != expected.dims() {
            return Err(other(format!(
                "tensor `{name}` is {:?}, the config asks for {:?}",
                tensor.dims(),
                expected.dims()
            )));
        }
        let values = tensor.flatten_all()?.to_vec1::<f32>()?;
        if values.iter().any(|value| !value.is_finite()) {
            return Err(Error::NotFinite { origin: origin.to_owned(), name: (*name).clone() });
        }
    }
    if let Some((name, tensor)) = tensors.iter().find(|(name, _)| !vars.contains_key(name)) {
        let shape = tensor.dims();
        return Err(other(format!("tensor `{name}` {shape:?} has no place in the config's model")));
    }
    for (name, var) in vars {
        if let Some(tensor) = tensors.get(*name) {
            var.set(&tensor.to_device(var.device())?)?;
        }
    }
    Ok(())
}

/// A tensor of the file, on the CPU.
fn tensor(origin: &str, name: &str, view: &TensorView) -> Result<Tensor> {
    if view.dtype() != Dtype::F32 {
        let problem = format!("tensor `{name}` is {:?}, not F32", view.dtype());
        return Err(Error::Architecture { origin: origin.to_owned(), problem });
    }
    let (chunks, _) = view.data().as_chunks::<4>();
    let values: Vec<f32> = chunks.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    Ok(Tensor::from_vec(values, view.shape(), &Device::Cpu)?)
}

/// Writes beside `path`, syncs, and renames into its place.
fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = folder.join(format!(".{name}.{}.tmp", std::process::id()));
    let write = || {
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        // The new name is on disk only once its folder is. Not every system can sync a folder.
        if cfg!(unix) {
            File::open(folder)?.sync_all()?;
        }
        Ok(())
    };
    write().map_err(|error| {
        // Nothing more can be done if this fails as well; the first error is the one to report.
        let _ = fs::remove_file(&temporary);
        Error::write(path)(error)
    })
}
