//! [`Model`]: a model folder, loaded.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use olive_core::{Error, Result};
use olive_onnx::OnnxFolder;

use crate::config::GenaiConfig;
use crate::exec::{Plan, PlanInfo};
use crate::kernels::pool::{self, Pool};
use crate::tokenizer::Tokenizer;

/// A model folder (`genai_config.json`, an ONNX graph and its data), compiled and ready to run. Cheap to clone.
#[derive(Clone)]
pub struct Model {
    pub(crate) inner: Arc<Loaded>,
}

pub(crate) struct Loaded {
    folder: PathBuf,
    config: GenaiConfig,
    pub(crate) plan: Plan,
    pool: Arc<Pool>,
    load_seconds: f64,
}

impl Model {
    /// Opens a folder. Float weights stay in the mapped file, packed ones are put into the kernels' order. The number of
    /// threads is `intra_op_num_threads` of the folder's session options, else rayon's.
    ///
    /// # Errors
    /// [`Error::File`] without a model or its description; errors of [`GenaiConfig::read`] and of the ONNX reader;
    /// [`Error::Unsupported`] that names every node that the runtime cannot run.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with_threads(path, None)
    }

    /// [`Model::open`] with a number of threads of its own. Results do not depend on it. Weights are packed by as many as
    /// rayon has if those are more.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn open_with_threads(path: impl AsRef<Path>, threads: Option<usize>) -> Result<Self> {
        let start = Instant::now();
        let folder = OnnxFolder::open(path)?;
        let config = GenaiConfig::read(folder.path())?;
        Self::load(start, folder, config, threads)
    }

    /// [`Model::open_with_threads`] and the folder's tokenizer, which is read on a thread of its own meanwhile: for a
    /// large vocabulary that takes as long as the weights.
    ///
    /// # Errors
    /// As [`Model::open`] and [`Tokenizer::new`].
    pub fn open_with_tokenizer(path: impl AsRef<Path>, threads: Option<usize>) -> Result<(Self, Tokenizer)> {
        let start = Instant::now();
        let folder = OnnxFolder::open(path)?;
        let config = GenaiConfig::read(folder.path())?;
        let (place, description) = (folder.path().to_path_buf(), config.clone());
        std::thread::scope(|scope| {
            let tokenizer = std::thread::Builder::new()
                .name("olive-tokenizer".to_owned())
                .spawn_scoped(scope, || Tokenizer::of(&place, &description))
                .map_err(Error::stage("threads"))?;
            let model = Self::load(start, folder, config, threads)?;
            let tokenizer = match tokenizer.join() {
                Ok(tokenizer) => tokenizer?,
                Err(panic) => std::panic::resume_unwind(panic),
            };
            Ok((model, tokenizer))
        })
    }

    fn load(start: Instant, folder: OnnxFolder, config: GenaiConfig, threads: Option<usize>) -> Result<Self> {
        let path = folder.path().to_path_buf();
        let threads = threads
            .or(config.threads())
            .unwrap_or_else(rayon::current_num_threads);
        let pool = pool::shared(threads).map_err(Error::stage("threads"))?;
        // Weights are packed by all cores, however many answer: most of the time goes into new pages.
        let packers =
            pool::shared(threads.max(rayon::current_num_threads())).map_err(Error::stage("threads"))?;
        let plan = packers.install(|| Plan::new(folder.into_model(), &config.graph_names()))?;
        drop(packers);
        let layers = config.model.decoder.num_hidden_layers;
        if layers != 0 && layers != plan.info().layers {
            let origin = path.join("genai_config.json").display().to_string();
            let expected = format!("{}, the layers of the graph", plan.info().layers);
            return Err(Error::config(
                origin,
                "model.decoder.num_hidden_layers",
                expected,
                layers.to_string(),
            ));
        }
        let load_seconds = start.elapsed().as_secs_f64();
        Ok(Self {
            inner: Arc::new(Loaded {
                folder: path,
                config,
                plan,
                pool,
                load_seconds,
            }),
        })
    }

    /// The folder that holds the graph.
    pub fn folder(&self) -> &Path {
        &self.inner.folder
    }

    /// The folder's description.
    pub fn config(&self) -> &GenaiConfig {
        &self.inner.config
    }

    /// The kind of model, as the folder says.
    pub fn kind(&self) -> &str {
        &self.inner.config.model.kind
    }

    /// What is known about the graph.
    pub fn info(&self) -> &PlanInfo {
        self.inner.plan.info()
    }

    /// How long opening took.
    pub fn load_seconds(&self) -> f64 {
        self.inner.load_seconds
    }

    /// Lets the loops of `work` run on the model's threads.
    pub(crate) fn install<T>(&self, work: impl FnOnce() -> T) -> T {
        self.inner.pool.install(work)
    }
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model")
            .field("folder", &self.inner.folder)
            .field("info", self.info())
            .finish()
    }
}
