"""Measures the objects of numpy, pyarrow, polars, torch and PIL, whose memory Python does not see.

pandas and scipy need no handlers, because their objects refer to arrays. Only libraries that the
notebook has imported are used. Their objects are read through the getters of the libraries' own
classes, so that a subclass of the notebook cannot intervene.
"""

import array
import mmap
import sys

from .object_sizes import BUILT_IN, LEAST_SPARSE_BYTES, NEVER, bases_of, evenly, shallow_bytes

ARRAY_BYTES = 112


def library_handlers():
    """Return the handlers by type: the built-in ones, and those of the imported libraries."""
    handlers = dict(BUILT_IN)
    handlers.update(dict.fromkeys(NEVER))
    for name, register in LIBRARIES.items():
        module = sys.modules.get(name)
        if module is not None:
            try:
                register(module, handlers)
            except (AttributeError, KeyError):
                # Another module has the name, or it is still being imported.
                continue
    return handlers


# Objects that own the data of an array and are measured themselves.
OWNERS = (bytes, bytearray, memoryview, mmap.mmap, array.array)


def register_numpy(numpy, handlers):
    """Add the handler for arrays."""
    kind = numpy.ndarray
    base_of = kind.__dict__["base"].__get__
    size_of = kind.__dict__["nbytes"].__get__
    dtype_of = kind.__dict__["dtype"].__get__
    interface_of = kind.__dict__["__array_interface__"].__get__
    flat_of = kind.__dict__["flat"].__get__
    torch = sys.modules.get("torch")
    owner_kinds = (*OWNERS, *((torch.Tensor,) if hasattr(torch, "Tensor") else ()))

    def address_of(owner):
        return interface_of(owner)["data"][0]

    def count_array(walk, thing, part, waiting):
        owner, base = thing, base_of(thing)
        while base is not None and kind in bases_of(base):
            owner, base = base, base_of(base)
        walk.partial += ARRAY_BYTES * part.weight
        if base is not None:
            if any(owner_kind in bases_of(base) for owner_kind in owner_kinds):
                walk.add((base,), part, waiting)
            else:
                walk.buffer(address_of(owner), address_of(owner), size_of(owner), part)
            return
        if owner is not thing and not walk.is_new(owner, None):
            return
        size = size_of(owner)
        address = address_of(owner) if size >= LEAST_SPARSE_BYTES else None
        walk.buffer(("array", id(owner)), address, size, part)
        if dtype_of(owner).hasobject:
            count_elements(walk, owner, size // (dtype_of(owner).itemsize or 1), part, waiting)

    def count_elements(walk, owner, total, part, waiting):
        if dtype_of(owner).kind != "O":
            # Fields of a structure, or strings of variable length.
            walk.exact = False
            return
        bytes_before = walk.partial
        flat = flat_of(owner)
        elements = [flat[at] for at in evenly(total, part.allowance)]
        walk.add_elements(elements, total, part, waiting)
        walk.object_bytes += int(walk.partial - bytes_before) + total * 8

    handlers[kind] = count_array


def register_pyarrow(pyarrow, handlers):
    """Add the handlers for tables, columns and buffers."""

    def count_buffers(walk, buffers, part):
        for buffer in buffers:
            if buffer is not None and buffer.is_cpu:
                walk.buffer(buffer.address, buffer.address, buffer.size, part)

    def count_array(walk, thing, part, _waiting):
        count_buffers(walk, thing.buffers(), part)

    def count_chunks(walk, thing, part, _waiting):
        for chunk in thing.chunks:
            count_buffers(walk, chunk.buffers(), part)

    def count_table(walk, thing, part, _waiting):
        for column in thing.columns:
            for chunk in getattr(column, "chunks", (column,)):
                count_buffers(walk, chunk.buffers(), part)

    handlers[pyarrow.Buffer] = lambda walk, thing, part, _: count_buffers(walk, (thing,), part)
    handlers[pyarrow.Array] = count_array
    handlers[pyarrow.ChunkedArray] = count_chunks
    handlers[pyarrow.Table] = handlers[pyarrow.RecordBatch] = count_table


def register_polars(polars, handlers):
    """Add the handlers for tables and columns; polars does not tell which buffers they share."""

    def count_frame(walk, thing, part, _waiting):
        frame = vars(thing)["_df"]
        walk.buffer(("polars", id(frame)), None, frame.estimated_size(), part)

    def count_series(walk, thing, part, _waiting):
        series = vars(thing)["_s"]
        walk.buffer(("polars", id(series)), None, series.estimated_size(), part)

    handlers[polars.DataFrame], handlers[polars.Series] = count_frame, count_series


def register_torch(torch, handlers):
    """Add the handler for tensors in main memory."""
    storage_of = torch.Tensor.untyped_storage
    is_leaf = torch.Tensor.is_leaf.__get__
    gradient_of = torch.Tensor.grad.__get__

    def count_tensor(walk, thing, part, waiting):
        walk.partial += shallow_bytes(thing) * part.weight
        storage = storage_of(thing)
        if storage.device.type == "cpu":
            address = storage.data_ptr()
            walk.buffer(address, address, storage.nbytes(), part)
        # Another tensor's gradient warns.
        if is_leaf(thing) and gradient_of(thing) is not None:
            walk.add((gradient_of(thing),), part, waiting)

    # A subclass may redefine every operation: only these two.
    for kind in (torch.Tensor, torch.nn.Parameter):
        handlers[kind] = count_tensor


def register_images(images, handlers):
    """Add the handler for the pixels of an image."""
    del images
    core = sys.modules["PIL._imaging"]
    kind = type(core.new("L", (1, 1)))
    # Bits of a pixel in memory: one byte for a single band, four for more.
    single = ("1", "L", "P")

    def count_pixels(walk, thing, part, _waiting):
        width, height = thing.size
        size = width * height * (1 if thing.mode in single else 4)
        walk.buffer(("pixels", id(thing)), None, size, part)

    handlers[kind] = count_pixels


LIBRARIES = {
    "numpy": register_numpy,
    "pyarrow": register_pyarrow,
    "polars": register_polars,
    "torch": register_torch,
    "PIL.Image": register_images,
}
