//! Files whose lock says whether a process is still there: the system gives it up with the process.

use std::{
    fs::{File, TryLockError},
    path::Path,
};

use crate::TrainError;

/// Creates `name` in `folder` and holds its lock as long as the result lives. The lock is held before the file gets its
/// name: another process finds either no file or one that is held.
///
/// # Errors
/// A folder that cannot be written to.
pub fn hold(folder: &Path, name: &str) -> Result<File, TrainError> {
    let unnamed = folder.join(format!("{name}.new"));
    let lock = File::create(&unnamed).map_err(TrainError::at(&unnamed))?;
    lock.lock().map_err(TrainError::at(&unnamed))?;
    std::fs::rename(&unnamed, folder.join(name)).map_err(TrainError::at(&unnamed))?;
    Ok(lock)
}

/// Whether a process holds `name` in `folder`; `None` if there is no such file, such as that of a process that is
/// starting.
pub fn is_held(folder: &Path, name: &str) -> Option<bool> {
    let lock = File::open(folder.join(name)).ok()?;
    Some(matches!(lock.try_lock_shared(), Err(TryLockError::WouldBlock)))
}
