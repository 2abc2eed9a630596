use crate::TrainError;
use crate::seed::{Generator, Purpose};

/// Which rows each batch of a task has, by pure arithmetic: any batch can be asked for at any time, so that a task goes on
/// from a checkpoint as if it had never stopped.
///
/// ```
/// use pswitch_train::Batches;
///
/// let mut batches = Batches::new(10, 4, None, false)?;
/// assert_eq!(batches.per_epoch(), 3);
/// let last = batches.batch(5);
/// assert_eq!((last.epoch, last.position, last.rows), (1, 2, vec![8, 9]));
/// # Ok::<(), pswitch_train::TrainError>(())
/// ```
#[derive(Debug, Clone)]
pub struct Batches {
    rows: u64,
    batch_size: u64,
    per_epoch: u64,
    shuffle: Option<Shuffle>,
}

/// The rows of one batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchRows {
    /// The epoch, counted from 0.
    pub epoch: u64,
    /// The batch's place in the epoch, counted from 0.
    pub position: u64,
    /// Its rows: as many as a batch has, or fewer at the end of an epoch.
    pub rows: Vec<u64>,
}

/// The order of the rows in one epoch.
#[derive(Debug, Clone)]
struct Shuffle {
    seed: u64,
    rows: u32,
    /// The epoch that `order` is for; none at first.
    epoch: Option<u64>,
    /// Rows in their order; with room for all of them from the start.
    order: Vec<u32>,
}

impl Batches {
    /// The most rows that can be shuffled: their order takes four bytes a row.
    pub const MOST_SHUFFLED_ROWS: u64 = u32::MAX as u64;

    /// Divides `rows` into batches of `batch_size`. With a seed, rows come in another order in each epoch: a permutation of
    /// its own for each seed and epoch, each as likely as any other. The last batch of an epoch has what is left, or is
    /// left out with `drop_last`.
    ///
    /// # Errors
    ///
    /// [`TrainError::NoBatches`] if there are no rows or batches have none, [`TrainError::NoFullBatch`] if none is left, or
    /// [`TrainError::TooManyRowsToShuffle`].
    pub fn new(
        rows: u64,
        batch_size: u64,
        shuffle_seed: Option<u64>,
        drop_last: bool,
    ) -> Result<Batches, TrainError> {
        if rows == 0 || batch_size == 0 {
            return Err(TrainError::NoBatches { rows, batch_size });
        }
        if drop_last && rows < batch_size {
            return Err(TrainError::NoFullBatch { rows, batch_size });
        }
        let shuffle = shuffle_seed.map(|seed| Shuffle::new(seed, rows)).transpose()?;
        let per_epoch = if drop_last { rows / batch_size } else { rows.div_ceil(batch_size) };
        Ok(Batches { rows, batch_size, per_epoch, shuffle })
    }

    /// Batches of one epoch; at least 1.
    pub fn per_epoch(&self) -> u64 {
        self.per_epoch
    }

    /// Batch number `index` of the task, counted from 0 through all epochs. With shuffling, the first batch that is asked
    /// for of an epoch takes time in proportion to the rows.
    pub fn batch(&mut self, index: u64) -> BatchRows {
        let (epoch, position) = (index / self.per_epoch, index % self.per_epoch);
        let begin = position * self.batch_size;
        let end = begin.saturating_add(self.batch_size).min(self.rows);
        let rows = match &mut self.shuffle {
            None => (begin..end).collect(),
            Some(shuffle) => shuffle.rows(epoch, begin, end),
        };
        BatchRows { epoch, position, rows }
    }
}

impl Shuffle {
    fn new(seed: u64, rows: u64) -> Result<Shuffle, TrainError> {
        let most = Batches::MOST_SHUFFLED_ROWS;
        let refused = TrainError::TooManyRowsToShuffle { rows, most };
        let Ok(rows) = u32::try_from(rows) else {
            return Err(refused);
        };
        let mut order = Vec::new();
        order.try_reserve_exact(rows as usize).map_err(|_| refused)?;
        Ok(Shuffle { seed, rows, epoch: None, order })
    }

    fn rows(&mut self, epoch: u64, begin: u64, end: u64) -> Vec<u64> {
        if self.epoch != Some(epoch) {
            self.shuffle(epoch);
        }
        let index = |row| usize::try_from(row).expect("there are at most u32::MAX rows");
        self.order[index(begin)..index(end)].iter().map(|row| u64::from(*row)).collect()
    }

    /// Fisher and Yates' shuffle, from the rows in their order, so that it depends on seed and epoch alone.
    fn shuffle(&mut self, epoch: u64) {
        self.order.clear();
        self.order.extend(0..self.rows);
        let mut generator = Generator::keyed(self.seed, Purpose::Shuffle, &[epoch]);
        for last in (1..self.order.len()).rev() {
            let other = generator.below(last as u64 + 1);
            self.order.swap(last, usize::try_from(other).expect("it is at most `last`"));
        }
        self.epoch = Some(epoch);
    }
}
