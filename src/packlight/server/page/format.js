// Numbers as packlight writes them in its tables (report/table.py, spec.format_size), with spaces that do not break.

const UNITS = ["kB", "MB", "GB", "TB", "PB"];

/** Bytes in decimal units: 98.4 MB, 1.35 GB. */
export function formatSize(bytes) {
  if (Math.abs(bytes) < 1000) return `${bytes.toFixed(0)}\u00a0B`;
  let value = bytes;
  let unit = "B";
  for (unit of UNITS) {
    value /= 1000;
    if (Math.abs(value) < 999.5) break;
  }
  return `${Math.abs(value) < 100 ? significant(value, 3) : value.toFixed(0)}\u00a0${unit}`;
}

/** Whole with thousands separated from 1000 on, four significant digits below. */
export function formatNumber(value) {
  return Math.abs(value) >= 1000 ? grouped(value) : significant(value, 4);
}

/** 12,345. */
export function grouped(value) {
  return value.toFixed(0).replace(/\B(?=(\d{3})+$)/g, ",");
}

/** So many significant digits, no trailing zeros, an exponent below 0.0001, as Python's `g`. */
export function significant(value, digits) {
  if (value === 0) return "0";
  const [mantissa, power] = value.toExponential(digits - 1).split("e");
  const exponent = Number(power);
  if (exponent >= -4 && exponent < digits) return String(Number(value.toPrecision(digits)));
  const size = String(Math.abs(exponent)).padStart(2, "0");
  return `${Number(mantissa)}e${exponent < 0 ? "-" : "+"}${size}`;
}

/** 93.0 %. */
export function formatShare(value) {
  return `${(100 * value).toFixed(1)}\u00a0%`;
}

/** How far a value is from a reference, with its sign: +1.1 %. Empty where the reference is zero. */
export function formatDifference(value, reference) {
  if (!reference) return "";
  const percent = (100 * (value - reference)) / reference;
  return `${percent < 0 ? "−" : "+"}${Math.abs(percent).toFixed(1)}\u00a0%`;
}
