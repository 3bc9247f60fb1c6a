# find_package(tactic) for the library; the plug-in and the command beside it.
include(CMakePackageConfigHelpers)
install(TARGETS tactic EXPORT tactic-targets ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY include/tactic DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} PATTERN cuda.h EXCLUDE)
if(TACTIC_BUILD_CUDA)
  set_target_properties(tactic_cuda PROPERTIES EXPORT_NAME cuda)
  install(TARGETS tactic_cuda EXPORT tactic-targets ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
  install(FILES include/tactic/cuda.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/tactic)
endif()
install(EXPORT tactic-targets NAMESPACE tactic:: DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/tactic)
configure_package_config_file(cmake/tactic-config.cmake.in ${PROJECT_BINARY_DIR}/tactic-config.cmake
  INSTALL_DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/tactic)
write_basic_package_version_file(${PROJECT_BINARY_DIR}/tactic-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/tactic-config.cmake ${PROJECT_BINARY_DIR}/tactic-config-version.cmake
  DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/tactic)
install(FILES ${PROJECT_SOURCE_DIR}/LICENSE DESTINATION ${CMAKE_INSTALL_DATADIR}/doc/tactic)
if(TACTIC_BUILD_PLUGIN)
  # Beside the library and not in a directory for multiarch packages: the command looks in ../lib.
  install(TARGETS ggml-tactic LIBRARY DESTINATION lib)
endif()
if(TACTIC_BUILD_TOOLS)
  # With the llama.cpp it was built for, so that it goes on working when the cache is emptied.
  install(DIRECTORY ${TACTIC_LLAMA_DIR}/build/bin/ DESTINATION lib/tactic
    FILES_MATCHING PATTERN "libllama.so*" PATTERN "libggml*.so*")
  install(FILES ${TACTIC_LLAMA_SOURCE}/LICENSE DESTINATION ${CMAKE_INSTALL_DATADIR}/doc/tactic RENAME LICENSE.llama.cpp)
  set_target_properties(tactic_command PROPERTIES INSTALL_RPATH "$ORIGIN/../lib/tactic")
  install(TARGETS tactic_command RUNTIME DESTINATION bin)
endif()
