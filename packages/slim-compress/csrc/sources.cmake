# Sources of the codec, shared by the Python module and the fuzzers. Each instruction set has a file
# of its own with its own flags; dispatch.cpp chooses at run time.
set(SLC1_SOURCES)
foreach(part
    build_table container decoder dispatch encoder huffman kernels_scalar layout nz output survey
    tables)
  list(APPEND SLC1_SOURCES ${CMAKE_CURRENT_LIST_DIR}/${part}.cpp)
endforeach()
set(SLC1_DEFINITIONS)

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  set(avx2 -mavx2 -mbmi -mbmi2 -mlzcnt -mpopcnt -msse4.2)
  set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512vl -mavx512vbmi -mavx512vbmi2)
  list(APPEND SLC1_DEFINITIONS SLC1_HAVE_X86)
  foreach(isa avx2 avx512)
    list(APPEND SLC1_SOURCES ${CMAKE_CURRENT_LIST_DIR}/kernels_${isa}.cpp)
    set_source_files_properties(
      ${CMAKE_CURRENT_LIST_DIR}/kernels_${isa}.cpp PROPERTIES COMPILE_OPTIONS "${${isa}}")
  endforeach()
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
  # The CRC instructions are optional in ARMv8.0 and mandatory from 8.1; servers all have them.
  list(APPEND SLC1_DEFINITIONS SLC1_HAVE_NEON)
  list(APPEND SLC1_SOURCES ${CMAKE_CURRENT_LIST_DIR}/kernels_neon.cpp)
  set_source_files_properties(
    ${CMAKE_CURRENT_LIST_DIR}/kernels_neon.cpp PROPERTIES COMPILE_OPTIONS "-march=armv8-a+crc")
endif()
