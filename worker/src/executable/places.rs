//! Where a program's weights lie: each is a view that can be made anew over another place.

use pswitch_device::DeviceAddress;
use pswitch_model::Weight;

use super::{Executable, Table, fault, view_of};
use crate::error::RunError;

impl Executable {
    /// Whether there are weights that can be read from the host.
    pub(crate) fn has_tables(&self) -> bool {
        !self.tables.is_empty()
    }

    /// Says where the next runs read those weights from that can be read from the host.
    ///
    /// # Errors
    /// If libtorch refuses the view.
    pub(crate) fn read_tables(&mut self, from_host: bool) -> Result<(), RunError> {
        if self.tables_on_host == Some(from_host) {
            return Ok(());
        }
        self.tables_on_host = None;
        for Table { weight, home, host } in &self.tables {
            let address = if from_host { *host } else { *home };
            // SAFETY: whoever built the executable promised that both stay mapped.
            unsafe { self.values.set_view(weight.value, address, &view_of(weight), self.device) }
                .map_err(|raised| fault("a table", raised))?;
        }
        self.tables_on_host = Some(from_host);
        Ok(())
    }

    /// Has all weights lie in another place of the pool from now on, where they are guarded as they were.
    ///
    /// # Safety
    /// As [`build`](Self::build), for the new addresses.
    ///
    /// # Errors
    /// If libtorch refuses a view: then some lie there and some do not, until it is done again.
    pub(crate) unsafe fn move_span<'a>(
        &mut self,
        weights: impl Iterator<Item = (&'a Weight, DeviceAddress)>,
    ) -> Result<(), RunError> {
        let weights: Vec<_> = weights.collect();
        self.values.protect_nothing();
        for (weight, address) in &weights {
            self.values.protect(*address, weight.extent_bytes());
        }
        for table in &mut self.tables {
            self.values.protect(table.host, table.weight.extent_bytes());
            let moved = weights.iter().find(|(weight, _)| weight.value == table.weight.value);
            table.home = moved.map_or(table.home, |(_, address)| *address);
        }
        self.tables_on_host = None;
        // SAFETY: the caller's promise.
        unsafe { self.move_weights(weights.into_iter()) }?;
        self.tables_on_host = Some(false);
        Ok(())
    }

    /// Has weights lie elsewhere from now on. There they are not guarded against operators that would write to them.
    ///
    /// # Safety
    /// As [`build`](Self::build), for the new addresses.
    ///
    /// # Errors
    /// If libtorch refuses a view.
    pub(crate) unsafe fn move_weights<'a>(
        &mut self,
        weights: impl Iterator<Item = (&'a Weight, DeviceAddress)>,
    ) -> Result<(), RunError> {
        for (weight, address) in weights {
            // SAFETY: the caller's promise.
            unsafe { self.values.set_view(weight.value, address, &view_of(weight), self.device) }
                .map_err(|raised| fault("a weight", raised))?;
        }
        for &(first, tied) in &self.tied {
            self.values.share(first, tied);
        }
        Ok(())
    }
}
