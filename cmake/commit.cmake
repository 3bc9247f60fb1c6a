# Writes OUT, which defines TACTIC_COMMIT: what `git describe` says of SOURCE now. Run at every build; touches the file only
# when the text changes, so that nothing is compiled in vain.
execute_process(COMMAND git describe --always --dirty --abbrev=12
  WORKING_DIRECTORY ${SOURCE} OUTPUT_VARIABLE commit RESULT_VARIABLE failed
  OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
if(failed OR NOT commit)
  set(commit unknown)   # no git, or sources from an archive
endif()
file(CONFIGURE OUTPUT ${OUT} CONTENT "#define TACTIC_COMMIT \"${commit}\"\n")
