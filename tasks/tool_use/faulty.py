"""Items whose accepted answers the official rules refuse, with the reason; bfcl-eval 2026.3.23 scores them 0 too."""

FAULTY_ITEMS = {
    "simple_java_36": "parts: a number and a truth value are accepted, but elements of type any are compared as text",
    "simple_java_65": "params: truth values are accepted, but elements of type any are compared as text",
    "live_simple_106-63-0": "auto_loan_payment_start: no accepted value at all, and it may not be left out",
    "live_simple_112-68-0": "acc_routing_start and others: no accepted value at all, and they may not be left out",
    "live_multiple_862-181-3": "journey_start_time: must be given, but the function has no such parameter",
    "live_multiple_964-207-0": "statement: required by the function, but not among the accepted arguments",
}
