// Python bindings: arguments in, arrays out; the work is elsewhere and runs without the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "codec.hpp"
#include "nz.hpp"

namespace py = pybind11;

namespace {

using slc1::Container;
using slc1::Problem;
using slc1::View;

View view_of(const py::array& a) {
  return {static_cast<std::uint8_t*>(const_cast<void*>(a.data())), a.strides(0), a.strides(1)};
}

void require(bool condition, const char* message) {
  if (!condition) throw py::value_error(message);
}

void require_bytes(const py::array& a, py::ssize_t ndim, const char* message) {
  require(a.itemsize() == 1 && a.ndim() == ndim, message);
}

struct Bytes {
  const std::uint8_t* data;
  std::size_t size;
};

Bytes bytes_of(const py::array& a, const char* message) {
  require_bytes(a, 1, message);
  require(a.shape(0) == 0 || a.strides(0) == 1, message);
  return {static_cast<const std::uint8_t*>(a.data()), static_cast<std::size_t>(a.shape(0))};
}

constexpr const char* kWeight = "weight must be a contiguous 1-D array of bytes";
constexpr const char* kIndex = "index must be a contiguous 1-D array of bytes";

// The exception that Python code sees; args are (tile or -1, reason).
PYBIND11_CONSTINIT py::gil_safe_call_once_and_store<py::object> stream_error;

void raise_if(const Problem& problem) {
  if (problem.reason == nullptr) return;
  const py::object args = py::make_tuple(problem.tile, problem.reason);
  PyErr_SetObject(stream_error.get_stored().ptr(), args.ptr());
  throw py::error_already_set();
}

Container open_container(const Bytes& weight, const Bytes& index) {
  Container container;
  Problem problem;
  {
    const py::gil_scoped_release release;
    problem = container.open(index.data, index.size, weight.size);
  }
  raise_if(problem);
  return container;
}

py::tuple encode(const py::array& matrix, std::size_t threads, bool fast, std::size_t tile_n,
                 std::size_t tile_k, std::size_t max_tables, bool escapes, bool transposed) {
  require_bytes(matrix, 2, "matrix must be a 2-D array of bytes");
  require(matrix.shape(0) > 0 && matrix.shape(1) > 0, "matrix must not be empty");
  constexpr py::ssize_t kMaxSide = py::ssize_t{1} << 31;
  require(matrix.shape(0) <= kMaxSide && matrix.shape(1) <= kMaxSide,
          "matrix sides must be at most 2^31");
  require(tile_n >= 1 && tile_n <= slc1::kMaxTileFractals && tile_k >= 1 &&
              tile_k <= slc1::kMaxTileFractals,
          "tile sides must be in [1, 8]");
  require(threads >= 1, "threads must be at least 1");
  require(max_tables >= 1 && max_tables <= slc1::kMaxTables, "max_tables must be in [1, 4]");
  slc1::EncodeOptions options;
  options.threads = threads;
  options.fast = fast;
  options.tile_n = tile_n;
  options.tile_k = tile_k;
  options.max_tables = max_tables;
  options.escapes = escapes;
  options.flags = transposed ? slc1::kFlagTransposed : 0;
  slc1::Encoded encoded;
  const View view = view_of(matrix);
  {
    const py::gil_scoped_release release;
    encoded = slc1::encode(view, static_cast<std::size_t>(matrix.shape(0)),
                           static_cast<std::size_t>(matrix.shape(1)), options);
  }
  auto* memory = reinterpret_cast<std::int8_t*>(encoded.weight.release());
  const py::capsule owner(memory, std::free);
  py::array_t<std::int8_t> weight(static_cast<py::ssize_t>(encoded.weight_size), memory, owner);
  py::array_t<std::int8_t> index(static_cast<py::ssize_t>(encoded.index.size()));
  std::memcpy(index.mutable_data(), encoded.index.data(), encoded.index.size());
  return py::make_tuple(weight, index);
}

void decode_into(const py::array& weight, const py::array& index, py::array out,
                 std::size_t threads) {
  const Bytes w = bytes_of(weight, kWeight);
  const Bytes i = bytes_of(index, kIndex);
  require(threads >= 1, "threads must be at least 1");
  const Container container = open_container(w, i);
  require_bytes(out, 2, "out must be a 2-D array of bytes");
  require(out.writeable() && out.shape(0) == container.header().n &&
              out.shape(1) == container.header().k,
          "out must be writeable and have the shape of the matrix");
  const View view = view_of(out);
  Problem problem;
  {
    const py::gil_scoped_release release;
    problem = slc1::Decoder(container, w.data, w.size).decode(view, threads);
  }
  raise_if(problem);
}

void check(const py::array& weight, const py::array& index, std::size_t threads) {
  const Bytes w = bytes_of(weight, kWeight);
  const Container container = open_container(w, bytes_of(index, kIndex));
  require(threads >= 1, "threads must be at least 1");
  Problem problem;
  {
    const py::gil_scoped_release release;
    problem = slc1::Decoder(container, w.data, w.size).check(threads);
  }
  raise_if(problem);
}

py::bytes decode_tile(const py::array& weight, const py::array& index, std::size_t tile) {
  const Bytes w = bytes_of(weight, kWeight);
  const Bytes i = bytes_of(index, kIndex);
  const Container container = open_container(w, i);
  if (tile >= container.tiles()) throw py::index_error("no such tile");
  std::vector<std::uint8_t> scratch(slc1::kMaxTileBytes + slc1::kWriteSlack);
  Problem problem;
  {
    const py::gil_scoped_release release;
    problem = slc1::Decoder(container, w.data, w.size).decode_tile(tile, scratch.data());
  }
  raise_if(problem);
  const std::size_t bytes = slc1::TileBox(container.grid(), tile).bytes();
  return {reinterpret_cast<const char*>(scratch.data()), bytes};
}

py::dict inspect(const py::array& weight, const py::array& index) {
  const Bytes i = bytes_of(index, kIndex);
  const Container container = open_container(bytes_of(weight, kWeight), i);
  const slc1::Header& h = container.header();
  std::vector<std::uint64_t> modes(4, 0);
  for (std::size_t t = 0; t < container.tiles(); ++t) {
    ++modes[static_cast<std::size_t>(container.entry(t).mode)];
  }
  py::dict d;
  d["n"] = h.n;
  d["k"] = h.k;
  d["tile_n"] = h.tile_n;
  d["tile_k"] = h.tile_k;
  d["tiles"] = container.tiles();
  d["tables"] = h.tables;
  d["transposed"] = (h.flags & slc1::kFlagTransposed) != 0;
  d["modes"] = modes;
  return d;
}

py::array_t<std::int8_t> nd_to_nz(const py::array& matrix) {
  require_bytes(matrix, 2, "matrix must be a 2-D array of bytes");
  require(matrix.shape(0) > 0 && matrix.shape(1) > 0, "matrix must not be empty");
  const slc1::Grid grid(static_cast<std::size_t>(matrix.shape(0)),
                        static_cast<std::size_t>(matrix.shape(1)), 1, 1);
  py::array_t<std::int8_t> out({grid.k1, grid.n1, slc1::kFractalRows, slc1::kFractalCols});
  auto* to = reinterpret_cast<std::uint8_t*>(out.mutable_data());
  const View view = view_of(matrix);
  const py::gil_scoped_release release;
  slc1::nd_to_nz(view, grid, to);
  return out;
}

py::array_t<std::int64_t> histogram(const py::array& matrix) {
  require_bytes(matrix, 2, "matrix must be a 2-D array of bytes");
  py::array_t<std::int64_t> out(256);
  const View view = view_of(matrix);
  {
    const py::gil_scoped_release release;
    slc1::histogram(view, static_cast<std::size_t>(matrix.shape(0)),
                    static_cast<std::size_t>(matrix.shape(1)), out.mutable_data());
  }
  return out;
}

std::uint32_t crc32c(const py::array& data) {
  const Bytes b = bytes_of(data, "data must be a contiguous 1-D array of bytes");
  const py::gil_scoped_release release;
  return slc1::kernels().crc32c(b.data, b.size);
}

}  // namespace

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  stream_error.call_once_and_store_result([&] {
    return py::object(py::exception<Problem>(m, "StreamError", PyExc_ValueError));
  });
  using py::arg;
  m.def("encode", &encode, arg("matrix"), py::kw_only(), arg("threads") = 1, arg("fast") = false,
        arg("tile_n") = 8, arg("tile_k") = 8, arg("max_tables") = 4, arg("escapes") = true,
        arg("transposed") = false);
  m.def("decode_into", &decode_into, arg("weight"), arg("index"), arg("out"), py::kw_only(),
        arg("threads") = 1);
  m.def("check", &check, arg("weight"), arg("index"), py::kw_only(), arg("threads") = 1);
  m.def("decode_tile", &decode_tile, arg("weight"), arg("index"), arg("tile"));
  m.def("inspect", &inspect, arg("weight"), arg("index"));
  m.def("nd_to_nz", &nd_to_nz, arg("matrix"));
  m.def("histogram", &histogram, arg("matrix"));
  m.def("crc32c", &crc32c, arg("data"));
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const auto* k : slc1::available_kernels()) names.emplace_back(k->name);
    return names;
  });
  m.def("instruction_set", [] { return std::string(slc1::kernels().name); });
  m.def("use_instruction_set", [](const std::string& name) {
    if (!slc1::use_kernels(name)) throw py::value_error("no such instruction set here: " + name);
  }, arg("name"));
}
