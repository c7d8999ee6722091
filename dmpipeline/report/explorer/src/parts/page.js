// What every part of the page can reach: its data, and what examples are called.

import { createContext } from "preact";
import { useContext } from "preact/hooks";

export const Page = createContext(null);

/** {data, route, go}: `go(route)` shows something else and remembers it, `go(route, true)` without a step back. */
export const usePage = () => useContext(Page);
