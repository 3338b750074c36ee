//! Tests of whole runs, with a tiny model on a few images.

#[cfg(test)]
mod accumulate;
#[cfg(test)]
mod bits;
#[cfg(test)]
mod device_images;
#[cfg(test)]
mod evaluate;
#[cfg(test)]
mod folder;
#[cfg(test)]
mod prior;
#[cfg(test)]
mod recipe;
#[cfg(test)]
mod refusals;
#[cfg(test)]
mod resume;
#[cfg(test)]
mod support;
#[cfg(test)]
mod toy;
#[cfg(test)]
mod trainer;
