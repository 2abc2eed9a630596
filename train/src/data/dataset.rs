use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::array::{ArrayInfo, RowSource, check_gather, check_names};
use super::{TensorFile, mapped, npy};
use crate::TrainError;

/// Named arrays in files, memory-mapped, that have the same number of rows: the same first dimension.
///
/// A .npy file has one array, named by the file without its ending; a .safetensors file has any number of them. Several
/// files together make one data set. What is not read costs no memory.
#[derive(Debug)]
pub struct Dataset {
    rows: u64,
    infos: Vec<ArrayInfo>,
    /// Where the bytes of each array begin, in the order of `infos`.
    places: Vec<Place>,
    maps: Vec<Mmap>,
}

#[derive(Debug, Clone, Copy)]
struct Place {
    map: usize,
    start: usize,
}

impl Dataset {
    /// Opens files that end in .npy (version 1 to 3 of the format; C order; little-endian float16, float32, float64, int8,
    /// int16, int32, int64, uint8 and bool) or .safetensors. Arrays stand in the order of the files, those of one file in
    /// the order of their names.
    ///
    /// Nobody may shorten a file while it is open: whoever reads it then dies of a signal.
    ///
    /// # Errors
    ///
    /// If a file cannot be read, is empty, torn or longer than it says, has something that is not supported; if arrays
    /// share a name or differ in their rows; if there are no arrays or no rows.
    pub fn open(files: &[PathBuf]) -> Result<Dataset, TrainError> {
        let mut found = Found { arrays: Vec::new(), maps: Vec::new() };
        // Each adds one map: the number of a place's map is that of its file.
        for path in files {
            match path.extension().and_then(|extension| extension.to_str()) {
                Some("npy") => found.add_npy(path)?,
                Some("safetensors") => found.add_tensors(path)?,
                _ => return Err(TrainError::UnknownFormat { path: path.clone() }),
            }
        }
        check_names(found.arrays.iter().map(|(info, _, _)| info))?;
        let rows = common_rows(&found.arrays, files)?;
        let (infos, places) = found.arrays.into_iter().map(|(info, _, place)| (info, place)).unzip();
        Ok(Dataset { rows, infos, places, maps: found.maps })
    }
}

/// What the files read so far have: arrays with their rows and places, and their maps.
struct Found {
    arrays: Vec<(ArrayInfo, u64, Place)>,
    maps: Vec<Mmap>,
}

impl Found {
    fn add_npy(&mut self, path: &Path) -> Result<(), TrainError> {
        let Some(name) = path.file_stem().and_then(|stem| stem.to_str()) else {
            return Err(TrainError::FileName { path: path.to_owned() });
        };
        let map = mapped::map(path)?;
        let header = npy::read(&map).map_err(|source| TrainError::Npy { path: path.to_owned(), source })?;
        self.add(name, header.dtype, &header.shape, header.data_start).map_err(in_file(path))?;
        self.maps.push(map);
        Ok(())
    }

    fn add_tensors(&mut self, path: &Path) -> Result<(), TrainError> {
        let file = TensorFile::open(path)?;
        for tensor in &file.tensors {
            self.add(&tensor.name, tensor.dtype, &tensor.shape, tensor.bytes.start).map_err(in_file(path))?;
        }
        self.maps.push(file.map);
        Ok(())
    }

    /// Adds an array of the map that is pushed next.
    fn add(
        &mut self,
        name: &str,
        dtype: pswitch_model::DType,
        shape: &[u64],
        start: usize,
    ) -> Result<(), TrainError> {
        let Some((rows @ 1.., row_shape)) = shape.split_first().map(|(rows, row_shape)| (*rows, row_shape))
        else {
            return Err(TrainError::NoRows { array: name.to_owned() });
        };
        let place = Place { map: self.maps.len(), start };
        self.arrays.push((ArrayInfo::new(name, dtype, row_shape)?, rows, place));
        Ok(())
    }
}

fn in_file(path: &Path) -> impl Fn(TrainError) -> TrainError {
    move |error| TrainError::DataFile { path: path.to_owned(), source: Box::new(error) }
}

fn common_rows(arrays: &[(ArrayInfo, u64, Place)], files: &[PathBuf]) -> Result<u64, TrainError> {
    let (first, first_rows, first_place) = arrays.first().ok_or(TrainError::NoArrays)?;
    match arrays.iter().find(|(_, rows, _)| rows != first_rows) {
        None => Ok(*first_rows),
        Some((info, rows, place)) => Err(TrainError::RowsDiffer {
            array: info.name().to_owned(),
            path: files[place.map].clone(),
            rows: *rows,
            other: first.name().to_owned(),
            other_path: files[first_place.map].clone(),
            other_rows: *first_rows,
        }),
    }
}

impl RowSource for Dataset {
    fn rows(&self) -> u64 {
        self.rows
    }

    fn arrays(&self) -> &[ArrayInfo] {
        &self.infos
    }

    fn gather(&self, array: usize, rows: &[u64], out: &mut [u8]) -> Result<(), TrainError> {
        let row_len = check_gather(self, array, rows, out)?.row_len();
        let place = self.places[array];
        let bytes = &self.maps[place.map][place.start..];
        for (row, out) in rows.iter().zip(out.chunks_exact_mut(row_len)) {
            let row = usize::try_from(*row).expect("the row lies in a mapped file");
            out.copy_from_slice(&bytes[row * row_len..][..row_len]);
        }
        Ok(())
    }
}
