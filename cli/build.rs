//! Links the binary so that it finds the libtorch it was built against.

fn main() {
    let libraries =
        std::env::var("DEP_PSWITCH_SHIM_LIBTORCH_LIB").expect("pswitch-worker names libtorch's folder");
    println!("cargo::rustc-link-arg=-Wl,-rpath,{libraries}");
}
