# The host: an unpatched llama.cpp tree with its shared libraries in build/bin.
foreach(name llama ggml ggml-base)
  set(library ${TACTIC_LLAMA_DIR}/build/bin/lib${name}.so)
  if(NOT EXISTS ${library})
    message(FATAL_ERROR "TACTIC_LLAMA_DIR=${TACTIC_LLAMA_DIR} holds no build/bin/lib${name}.so; scripts/setup.sh makes a tree that does")
  endif()
  add_library(${name} SHARED IMPORTED)
  set_target_properties(${name} PROPERTIES
    IMPORTED_LOCATION ${library}
    INTERFACE_INCLUDE_DIRECTORIES "${TACTIC_LLAMA_DIR}/source/include;${TACTIC_LLAMA_DIR}/source/ggml/include")
endforeach()
set_target_properties(llama PROPERTIES INTERFACE_LINK_LIBRARIES "ggml;ggml-base")
