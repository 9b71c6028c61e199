"""Readers of trained networks: ONNX files and files of matrices.

ONNX (``pip install "lipbounds[onnx]"``)::

    from lipbounds.interop import load_onnx

    fn, spec = load_onnx("net.onnx")                       # fn: one example -> logits (K,)
    form = lb.trace(fn, jax.ShapeDtypeStruct(spec.shape, spec.dtype))
    lb.liplt(form, pairwise=True)

Bounds and radii are in the units of the ONNX graph's input. Where the normalisation of the data is not part of the
graph, put it in front, and radii come out in raw units::

    form = lb.trace(lambda x: fn((x - mean) / std), jax.ShapeDtypeStruct(spec.shape, spec.dtype))

A file of matrices (.npz, .mat, .safetensors) of a multilayer perceptron::

    weights, biases = load_weights("mlp.npz")
    form = lb.from_weights(weights, biases, "relu")

A PyTorch ``state_dict`` holds no program, only tensors. Export the model to ONNX where you can (`torch.onnx.export`
writes the program, too). Otherwise save the tensors where PyTorch is, without pickle::

    from safetensors.torch import save_file
    save_file(model.eval().state_dict(), "net.safetensors")

and read them here. A multilayer perceptron (`nn.Sequential` of `nn.Linear` with one activation) needs nothing else:
`load_weights`, then `lb.from_weights`. `nn.Linear.weight` is (out, in), as expected. Any other architecture is written
once as a flax nnx module, whose parameters are then set::

    from safetensors.numpy import load_file
    state = load_file("net.safetensors")
    model = Net(rngs=nnx.Rngs(0))
    model.conv.kernel[...] = state["conv.weight"].transpose(2, 3, 1, 0)   # (out, in, h, w) -> (h, w, in, out)
    model.conv.bias[...] = state["conv.bias"]
    model.norm.scale[...] = state["bn.weight"]                              # nnx.BatchNorm
    model.norm.bias[...] = state["bn.bias"]
    model.norm.mean[...] = state["bn.running_mean"]
    model.norm.var[...] = state["bn.running_var"]                           # epsilon of torch is 1e-5
    model.head.kernel[...] = state["fc.weight"].T                           # (out, in) -> (in, out)
    model.head.bias[...] = state["fc.bias"]
    model.eval()

PyTorch flattens (C, H, W), flax (H, W, C): transpose to (C, H, W) before the first dense layer. Compare a few outputs
with those of PyTorch before you certify anything.
"""

from lipbounds.interop.onnx import InputSpec as InputSpec
from lipbounds.interop.onnx import load_onnx as load_onnx
from lipbounds.interop.weights import load_weights as load_weights
