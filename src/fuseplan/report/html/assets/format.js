// Numbers as people read them. Times come in nanoseconds and are shown in microseconds.

const NUMBERS = new Map();

function number(value, digits = 0) {
    if (!NUMBERS.has(digits)) {
        const options = { minimumFractionDigits: digits, maximumFractionDigits: digits };
        NUMBERS.set(digits, new Intl.NumberFormat("en-US", options));
    }
    const text = NUMBERS.get(digits).format(Math.abs(value));
    return value < 0 && /[1-9]/.test(text) ? `−${text}` : text;
}

/** 12345 -> "12.3"; without a unit, for columns that name it. */
const bare = (ns, digits = 1) => number(ns / 1000, digits);

const us = (ns, digits = 1) => `${bare(ns, digits)} µs`;

const share = (part, whole) => (whole ? `${number((100 * part) / whole, 1)} %` : "–");

/** A range of tokens, e.g. "65–512", which no line breaks apart. */
function spanText(span) {
    if (!span) return "all sizes";
    return span[0] === span[1] ? number(span[0]) : `${number(span[0])}\u2060–\u2060${number(span[1])}`;
}

const plural = (count, noun, many = `${noun}s`) => `${number(count)} ${count === 1 ? noun : many}`;

/** What applying a loser would change: positive is worse. */
function marginText(ns, digits = 1) {
    if (ns === null) return "can't be applied";
    if (ns === 0) return "no difference";
    return ns > 0 ? `${us(ns, digits)} worse` : `${us(-ns, digits)} better`;
}

const time = (ns) => (ns >= 1e9 ? `${number(ns / 1e9, 1)} s` : `${number(ns / 1e6, ns < 1e7 ? 1 : 0)} ms`);
