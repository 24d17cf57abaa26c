//! Which image a trainer's or a server's pods run: the user's own, the one for GPUs, or the one for CPUs.

use athanor_crds::PodOverrides;

const GPU: &str = "nvidia.com/gpu";

/// Images of one process.
#[derive(Clone, Copy, Debug)]
pub struct Images<'a> {
    pub cpu: &'a str,
    /// Image with CUDA, if the operator has one.
    pub cuda: Option<&'a str>,
    /// Option of the operator that sets the image with CUDA.
    pub option: &'static str,
}

/// The image of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice<'a> {
    pub image: &'a str,
    /// Why the pod is not expected to use the GPUs that it reserves.
    pub warning: Option<String>,
}

impl<'a> Images<'a> {
    /// Chooses the image of a pod. `own` is the user's, which has precedence: nothing is known about it.
    pub fn choose(self, own: Option<&'a str>, overrides: Option<&PodOverrides>) -> Choice<'a> {
        let fine = |image| Choice { image, warning: None };
        match (own, self.cuda) {
            (Some(own), _) => fine(own),
            (None, _) if gpus(overrides) == 0 => fine(self.cpu),
            (None, Some(cuda)) => fine(cuda),
            (None, None) => Choice {
                image: self.cpu,
                warning: Some(format!(
                    "the pods reserve {GPU}, but the operator has no image with CUDA ({}): {} cannot use a GPU unless it has \
                     CUDA; set that option, or spec.image",
                    self.option, self.cpu
                )),
            },
        }
    }
}

/// Returns the number of GPUs that each pod reserves.
pub fn gpus(overrides: Option<&PodOverrides>) -> u32 {
    let resources = overrides.and_then(|overrides| overrides.resources.as_ref());
    // Kubernetes takes the request of a GPU from its limit, and allows no other request.
    let limits = resources.and_then(|resources| resources.limits.as_ref());
    limits.and_then(|limits| limits.get(GPU)).and_then(|quantity| quantity.0.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn pods_with_gpus_get_the_image_with_cuda() {
        let pod = |resources| -> PodOverrides { serde_json::from_value(json!({"resources": resources})).unwrap() };
        let gpu = pod(json!({"limits": {"nvidia.com/gpu": "2"}}));
        let none = pod(json!({"limits": {"nvidia.com/gpu": "0", "memory": "1Gi"}}));
        assert_eq!((gpus(Some(&gpu)), gpus(Some(&none)), gpus(None)), (2, 0, 0));
        let images = |cuda| Images { cpu: "t:1", cuda, option: "--trainer-cuda-image" };
        for (own, cuda, overrides, image, warns) in [
            (None, None, None, "t:1", false),
            (None, Some("t:1-cuda"), None, "t:1", false),
            (None, Some("t:1-cuda"), Some(&none), "t:1", false),
            (None, Some("t:1-cuda"), Some(&gpu), "t:1-cuda", false),
            (None, None, Some(&gpu), "t:1", true),
            (Some("mine"), Some("t:1-cuda"), Some(&gpu), "mine", false),
            (Some("mine"), None, Some(&gpu), "mine", false),
        ] {
            let choice = images(cuda).choose(own, overrides);
            assert_eq!((choice.image, choice.warning.is_some()), (image, warns), "{own:?} {cuda:?} {overrides:?}");
        }
        let warning = images(None).choose(None, Some(&gpu)).warning.unwrap();
        assert!(warning.contains("--trainer-cuda-image") && warning.contains("t:1"), "{warning}");
    }
}
