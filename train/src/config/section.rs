use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};

/// A part of the configuration with keys of its own, in whose errors serde would lose the place.
pub(super) trait Section {
    /// What must stand there.
    const EXPECTED: &'static str;
}

/// Reads a section as a mapping. What serde derives for enums fails when all keys were read, and serde_yaml takes the
/// innermost mapping that is being read then for the place: without this, it is that of the whole configuration.
pub(super) fn section<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Section + Deserialize<'de>,
{
    deserializer.deserialize_map(SectionVisitor(PhantomData))
}

struct SectionVisitor<T>(PhantomData<T>);

impl<'de, T: Section + Deserialize<'de>> Visitor<'de> for SectionVisitor<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(T::EXPECTED)
    }

    fn visit_map<A: MapAccess<'de>>(self, keys: A) -> Result<T, A::Error> {
        T::deserialize(MapAccessDeserializer::new(keys))
    }
}
