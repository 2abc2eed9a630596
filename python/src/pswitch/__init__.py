"""Exports PyTorch models for the pswitch server and talks to it.

`pswitch.export.export_model` writes any `torch.nn.Module` as the `.pt2` archive that the server loads,
`pswitch-export` does so from the command line, and `pswitch.client.Client` sends requests. The remaining modules
serve pswitch's own tests: `pswitch.fixtures`, `pswitch.gpu_models` and `pswitch.sweep` write models with reference
outputs, `pswitch.demo` is the demonstration of `cargo xtask demo`.
"""

__version__ = "0.1.0"
