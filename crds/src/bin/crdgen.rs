//! Writes the CustomResourceDefinitions into a folder: `crdgen crds/`.

use std::{io, path::PathBuf, process::ExitCode};

fn main() -> ExitCode {
    let Some(folder) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: crdgen FOLDER");
        return ExitCode::FAILURE;
    };
    for (name, definition) in athanor_crds::schema::definitions() {
        let path = folder.join(name);
        let written = athanor_crds::schema::yaml(&definition)
            .map_err(io::Error::other)
            .and_then(|text| std::fs::write(&path, text));
        if let Err(error) = written {
            eprintln!("{}: {error}", path.display());
            return ExitCode::FAILURE;
        }
        println!("{}", path.display());
    }
    ExitCode::SUCCESS
}
