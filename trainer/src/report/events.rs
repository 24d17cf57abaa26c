//! The curves of a run while it goes on: an event file for TensorBoard next to the job's checkpoints.
//!
//! Where the output is a folder of this machine the file lies there and grows with each step. For an object store it
//! lies in the process's own folder and is uploaded whole before each checkpoint, so that a run that continues from the
//! checkpoint finds its curves. A run that starts again writes another file, whose first record voids what was written
//! beyond the checkpoint.

use std::{
    io,
    path::{Path, PathBuf},
};

use athanor_contract::{artifact::EVENTS, train::Hyperparameters};
use athanor_store::Location;
use jiff::Timestamp;

use super::{Step, fields::pairs, tensorboard::EventWriter};
use crate::TrainError;

/// Tags of the numbers that each step has: loss, learning rate, norm of the gradient before clipping.
pub const TRAINING: [&str; 3] = ["train/loss", "train/learning_rate", "train/gradient_norm"];

/// Rank 0's event file.
pub struct Events {
    folder: PathBuf,
    /// The upload's destination; absent where `folder` is the output.
    remote: Option<Location>,
    /// Steps that earlier files hold.
    step: u64,
    hyperparameters: Vec<(String, String)>,
    file: File,
}

enum File {
    /// A run without a further step leaves no file behind.
    Unwritten,
    Open(EventWriter),
    /// A curve is not worth a run: after a failure there are no more of it.
    Failed,
}

/// A file to send.
pub struct Upload {
    file: PathBuf,
    to: Location,
}

impl Events {
    /// Begins the events of a run that has taken `step` steps. `to` is the folder of the job's event files, `work` the process's own.
    pub fn new(to: Location, work: &Path, step: u64, h: &Hyperparameters) -> Result<Self, TrainError> {
        let (folder, remote) = match to.local_path() {
            Some(folder) => (folder, None),
            None => (work.join(EVENTS), Some(to)),
        };
        Ok(Self { folder, remote, step, hyperparameters: pairs(h)?, file: File::Unwritten })
    }

    pub fn step(&mut self, step: &Step) {
        let values = [step.loss, step.learning_rate, step.gradient_norm];
        let values: Vec<_> = TRAINING.into_iter().zip(values).collect();
        self.write(|writer, now| writer.scalars(step.step, &values, now));
    }

    /// `score` with its name.
    pub fn validated(&mut self, step: u64, (name, score): (&str, f64)) {
        self.write(|writer, now| writer.scalar(&format!("validation/{name}"), step, score, now));
    }

    /// The file as it is now, where it has to be sent.
    pub fn upload(&self) -> Option<Upload> {
        let File::Open(writer) = &self.file else { return None };
        let (file, to) = (writer.path().to_owned(), self.remote.as_ref()?);
        let to = to.child(&file.file_name()?.to_string_lossy());
        Some(Upload { file, to })
    }

    fn write(&mut self, what: impl FnOnce(&mut EventWriter, Timestamp) -> io::Result<()>) {
        let now = Timestamp::now();
        if matches!(self.file, File::Unwritten) {
            self.file = match self.begin(now) {
                Ok(writer) => File::Open(writer),
                Err(error) => failed(&self.folder, &error),
            };
        }
        if let File::Open(writer) = &mut self.file
            && let Err(error) = what(writer, now)
        {
            self.file = failed(writer.path(), &error);
        }
    }

    fn begin(&self, now: Timestamp) -> io::Result<EventWriter> {
        let mut writer = EventWriter::create(&self.folder, now)?;
        writer.resume(self.step + 1, now)?;
        if self.step == 0 {
            writer.hyperparameters(&self.hyperparameters, now)?;
        }
        Ok(writer)
    }
}

fn failed(path: &Path, error: &io::Error) -> File {
    tracing::warn!(%error, file = %path.display(), "there are no more curves for TensorBoard");
    File::Failed
}

impl Upload {
    /// Sends the whole file, records included that have been written since.
    pub async fn send(&self) -> Result<(), TrainError> {
        let bytes = tokio::fs::read(&self.file).await.map_err(TrainError::at(&self.file))?;
        self.to.write(bytes.into()).await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tensorboard::tests::scalars;

    fn step(step: u64) -> Step {
        Step { step, loss: 1.0 / step as f64, learning_rate: 0.1, gradient_norm: 2.0, samples: 1, tokens: 1 }
    }

    fn files(folder: &Path) -> Vec<PathBuf> {
        let mut files: Vec<PathBuf> =
            std::fs::read_dir(folder).into_iter().flatten().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files
    }

    #[test]
    fn a_file_in_a_local_output_grows_with_each_step() {
        let (out, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let to = athanor_store::open(&format!("file://{}/a b", out.path().display())).unwrap();
        let folder = out.path().join("a b");
        let new = |step| Events::new(to.clone(), work.path(), step, &Hyperparameters::default()).unwrap();
        let mut events = new(0);
        assert!(files(&folder).is_empty(), "a run without a step leaves nothing behind");
        for number in 1..=3 {
            events.step(&step(number));
            let file = &files(&folder)[0];
            assert_eq!(scalars(file).len() as u64, 3 * number, "as soon as the step is taken");
        }
        events.validated(3, ("accuracy", 0.5));
        assert_eq!(scalars(&files(&folder)[0])[9].0, "validation/accuracy");
        assert!(events.upload().is_none(), "it is there already");
        assert!(files(work.path()).is_empty());

        let mut again = new(2);
        again.step(&step(3));
        let files = files(&folder);
        assert_eq!((files.len(), scalars(&files[1]).len()), (2, 3));
    }

    #[tokio::test]
    async fn for_an_object_store_the_file_is_sent_whole() {
        let (out, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let local = athanor_store::open(&format!("file://{}/events", out.path().display())).unwrap();
        // Any store will do, as long as its name is not that of a local folder.
        let remote = Location { uri: "s3://bucket/events".into(), ..local };
        let mut events = Events::new(remote, work.path(), 0, &Hyperparameters::default()).unwrap();
        assert!(events.upload().is_none(), "nothing yet");
        for number in 1..=2 {
            events.step(&step(number));
            events.upload().unwrap().send().await.unwrap();
            let sent = files(&out.path().join("events"));
            assert_eq!(sent.len(), 1);
            assert_eq!(scalars(&sent[0]).len() as u64, 3 * number);
        }
    }

    #[test]
    fn a_file_that_cannot_be_written_ends_no_run() {
        let out = tempfile::NamedTempFile::new().unwrap();
        let to = athanor_store::open(&format!("file://{}/events", out.path().display())).unwrap();
        let mut events = Events::new(to, out.path(), 0, &Hyperparameters::default()).unwrap();
        events.step(&step(1));
        events.step(&step(2));
        assert!(events.upload().is_none());
    }
}
