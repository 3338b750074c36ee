//! End-to-end tests: the real `vq` binary, on tiny models and a few images.

#[cfg(test)]
mod broken;
#[cfg(test)]
#[cfg(unix)]
mod compare;
#[cfg(test)]
mod data_errors;
#[cfg(test)]
mod disk;
#[cfg(test)]
#[cfg(unix)]
mod killed;
#[cfg(test)]
mod likelihood;
#[cfg(test)]
mod made;
#[cfg(test)]
mod model;
#[cfg(test)]
mod prior;
#[cfg(test)]
mod support;
#[cfg(test)]
mod train;
#[cfg(test)]
mod usage_errors;
