"""Tests of pytest's own that end in another way when what they run is isolated, and why that is as it should be."""

from __future__ import annotations

_BEFORE = "tests, or the end of a fixture, look at what the tests before have left in the process: that is not there"
_LOOKS = "it looks into its own process for what the inner tests have done there: they ran in others"
_PRINTS = "the inner pytest prints to an object in the memory of this process; to a terminal, or a pipe, it prints the same"
_FILES = "files that tests make stay in their sandboxes, but for the tmp_path of those that fail"
_END = "what would happen when the interpreter ends (garbage, threads, atexit): a test's process ends at once"
_REPORTS = "a failure's report has a section on its sandbox more"
_DEATH = "what would end the whole run (a crash, an error within pytest) is that test's failure"
_CONTROL = "control characters are made visible before they come to pytest"
_KEY = "Ctrl-C, raised by a test, is shown with the place where the run was stopped"
_LETTER = "the letter that tells of a failure comes when the debugger is left, and here it matters what is printed behind it"
_NOT_YET = "not supported: a debugger within a debugger gives the terminal back when the inner one is left"
_LINKS = "modules outside of the project, which the user inside may not read or sees no more of: see --isolation-mount"
_TWICE = "hooks that are told of reports run in the test's process as well as in the user's"
_HEADING = "the heading of live logs comes once more, or in another place, where a hook of the project's logs"
_LOG_PATH = "a log file whose name a test's own hooks choose is written inside"
_STACKS = "the stacks of a test that dies are written by Python's faulthandler, which so is on in every sandbox"

EXPLAINED: dict[str, str] = {  # the first pattern that fits says why
    "testing/logging/test_reporting.py::test_log_set_path*": _LOG_PATH,
    **dict.fromkeys(
        """
        testing/python/fixtures.py::TestFillFixtures::test_override_*
        testing/python/fixtures.py::TestRequestBasic::test_request_addfinalizer_failing_setup
        testing/python/fixtures.py::TestRequestBasic::test_request_subrequest_addfinalizer_exceptions
        testing/python/fixtures.py::TestRequestBasic::test_setupdecorator_and_xunit
        testing/python/fixtures.py::TestFixtureUsages::test_funcarg_parametrized_and_used_twice
        testing/python/fixtures.py::TestAutouseDiscovery::test_autouse_in_module_and_two_classes
        testing/python/fixtures.py::TestAutouseManagement::test_uses_parametrized_resource
        testing/python/fixtures.py::TestAutouseManagement::test_session_parametrized_function
        testing/python/fixtures.py::TestAutouseManagement::test_parametrization_setup_teardown_ordering
        testing/python/fixtures.py::TestAutouseManagement::test_ordering_dependencies_torndown_first*
        testing/python/fixtures.py::TestFixtureMarker::test_parametrize
        testing/python/fixtures.py::TestFixtureMarker::test_scope_*
        testing/python/fixtures.py::TestFixtureMarker::test_dynamic_scope
        testing/python/fixtures.py::TestFixtureMarker::test_class_scope_with_normal_tests
        testing/python/fixtures.py::TestFixtureMarker::test_parametrize_function_scoped_finalizers_called
        testing/python/fixtures.py::TestErrors::test_issue498_fixture_finalizer_failing
        testing/python/fixtures.py::test_indirect_fixture_does_not_break_scope
        testing/python/fixtures.py::test_scoped_fixture_*
        testing/python/fixtures.py::test_subfixture_teardown_order
        testing/python/metafunc.py::TestMetafuncFunctional::test_parametrize_scope_overrides*
        testing/test_runner_xunit.py::test_method_setup_*
        testing/test_unittest.py::test_teardown
        testing/test_unittest.py::test_teardown_issue1649
        testing/test_unittest.py::test_no_teardown_if_setupclass_failed
        testing/test_unittest.py::test_cleanup_functions
        testing/test_unittest.py::test_async_support
        testing/test_unittest.py::test_do_*cleanups_on_*
        testing/test_session.py::TestNewSession::test_order_of_execution
        testing/logging/test_fixture.py::test_change_disabled_level_undo
        testing/test_terminal.py::test_fdopen_kept_alive_issue124
        testing/acceptance_test.py::test_fixture_values_leak
        testing/acceptance_test.py::test_frame_leak_on_failing_test
        """.split(),
        _BEFORE,
    ),
    **dict.fromkeys(
        """
        testing/python/fixtures.py::TestRequestBasic::test_request_addfinalizer_failing_setup_module
        testing/python/fixtures.py::TestFixtureUsages::test_fixture_parametrized_with_iterator
        testing/python/fixtures.py::TestAutouseManagement::test_class_function_parametrization_finalization
        testing/python/fixtures.py::TestFixtureMarker::test_parametrize_and_scope
        testing/python/fixtures.py::TestFixtureMarker::test_parametrize_separated_*
        testing/python/fixtures.py::TestFixtureMarker::test_request_is_clean
        testing/python/fixtures.py::TestFixtureMarker::test_class_scope_parametrization_ordering
        testing/python/metafunc.py::TestMetafuncFunctionalAuto::test_parametrize_some_arguments_auto_scope
        testing/test_runner.py::test_current_test_env_var
        testing/test_runner_xunit.py::test_module_setup_failure_no_teardown
        testing/test_runner_xunit.py::test_setup_*
        testing/test_unittest.py::test_setUpModule_failing_no_teardown
        testing/test_unittest.py::test_djangolike_testcase
        testing/test_unittest.py::test_trace
        testing/test_unittest.py::test_pdb_teardown_called
        testing/test_subtests.py::TestDebugging::test_pdb_*
        testing/test_debugging.py::TestPDB::test_pdb_on_*
        testing/test_debugging.py::TestDebuggingBreakpoints::test_pdb_custom_cls
        testing/test_debugging.py::test_pdbcls_via_local_module
        testing/test_debugging.py::test_pdb_wrapper_class_is_reused
        """.split(),
        _LOOKS,
    ),
    **dict.fromkeys(
        """
        testing/python/fixtures.py::TestContextManagerFixtureFuncs::test_*
        testing/python/fixtures.py::test_pytest_fixture_setup_and_post_finalizer_hook
        testing/python/fixtures.py::test_fixture_post_finalizer_hook_exception
        testing/python/fixtures.py::TestScopeOrdering::test_parametrized_package_scope_reordering
        testing/python/fixtures.py::TestScopeOrdering::test_reorder_*
        testing/python/metafunc.py::TestMetafuncFunctionalAuto::test_parametrize_issue634
        testing/python/integration.py::TestReRunTests::test_rerun
        testing/test_subtests.py::TestCapture::test_no_capture
        testing/test_legacypath.py::test_override_ini_paths
        testing/test_capture.py::TestCaptureFixture::test_capteesys*
        testing/test_capture.py::test_capture_early_option_parsing
        """.split(),
        _PRINTS,
    ),
    **dict.fromkeys(
        """
        testing/test_skipping.py::TestXFail::test_strict_xfail*
        testing/test_tmpdir.py::TestConfigTmpPath::test_policy_*
        testing/test_tmpdir.py::test_mktemp*
        testing/test_doctest.py::TestDoctestAutoUseFixtures::test_doctest_and_python_fixtures_not_shared
        """.split(),
        _FILES,
    ),
    **dict.fromkeys(
        """
        testing/test_threadexception.py::test_unhandled_thread_exception_after_teardown
        testing/test_unraisableexception.py::test_*
        testing/test_capture.py::TestLoggingInteraction::test_logging_after_cap_stopped
        """.split(),
        _END,
    ),
    "testing/logging/test_reporting.py::test_log_in_runtest_logreport": _TWICE,
    "testing/logging/test_reporting.py::test_live_logs_unknown_sections": _HEADING,
    "testing/test_reports.py::TestReportSerialization::test_chained_exceptions*": _REPORTS,
    "testing/test_junitxml.py::TestPython::test_internal_error*": _DEATH,
    "testing/test_debugging.py::TestPDB::test_pdb_interaction_on_internal_error": _DEATH,
    "testing/test_faulthandler.py::test_enabled": _DEATH,
    "testing/test_faulthandler.py::test_disabled": _STACKS,
    "testing/test_junitxml.py::test_nullbyte*": _CONTROL,
    "testing/test_terminal.py::TestTerminal::test_keyboard_interrupt*": _KEY,
    "testing/test_debugging.py::TestPDB::test_pdb_print_captured_stdout_and_stderr": _LETTER,
    "testing/test_debugging.py::TestPDB::test_pdb_continue_with_recursive_debug*": _NOT_YET,
    "testing/test_conftest.py::test_conftest_symlink_files": _LINKS,
    "testing/test_collection.py::test_collect_pyargs_with_testpaths": _LINKS,
}
