// Sliders made by ilora/study/sliders.py: one figure of each at a time. Without this script all of them are shown.
document.addEventListener("DOMContentLoaded", () => {
  for (const slider of document.querySelectorAll(".slider")) {
    const figures = slider.querySelectorAll("figure");
    const control = slider.querySelector(".slider-control");
    const input = control.querySelector("input");
    const show = () => {
      figures.forEach((figure, place) => { figure.hidden = place !== input.valueAsNumber; });
      const shown = figures[input.valueAsNumber];
      shown.tabIndex = shown.scrollWidth > shown.clientWidth ? 0 : -1;  // what scrolls must be reached by keys
      control.querySelector("output").textContent = shown.dataset.at;
      input.setAttribute("aria-valuetext", shown.querySelector("figcaption").textContent);
    };
    input.addEventListener("input", show);
    window.addEventListener("resize", show);
    control.hidden = false;
    show();
  }
});
