"""A CUDA device that is played on the CPU, so that the tests with the marker `gpu` run where there is no GPU.

    stream.py       what was launched, what the host may know of it, events, graphs
    memory.py       `DeviceTensor`, pinned memory, copies between host and device
    operations.py   torch's operations over device tensors
    install.py      `install` makes this process's torch believe in the device
    standins/       a package `flashinfer` with the functions that the product calls, in torch
    plugin.py       for pytest: `-p kvferry.tests.emulation.plugin`
    __main__.py     a program on the device: `python -m kvferry.tests.emulation -m MODULE ARGUMENT...`

The device is strict: what a real one lets pass by luck is an error here.

    mixed devices     a tensor of the host beside one of the device
    Race              pinned memory that changes before its upload was waited for
    reads too early   what was copied to pinned memory is garbage until somebody waits; fresh memory is NaN
    illegal capture   a wait, a copy to or from the host or a plan while a graph is captured

One device, one stream; numbers are those of torch on a CPU, times mean nothing, random numbers are not CUDA's. Kernels
are right by construction: a defect of FlashInfer's own is not seen.
"""
